"""ONNX → TensorRT, through `tensorrt_rtx` or `tensorrt`: one builder code, since their APIs are one.

TensorRT-RTX builds with no GPU, for architectures given by name. TensorRT builds on the device, for that device. An
attention that found no fused kernel is an error here unless the contract says so beforehand: undeclared, TensorRT
refuses to build it, and that refusal is the check.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mindomni_rt.backends.compiled.trt_module import import_tensorrt, make_logger
from mindomni_rt.bundle.contracts import GraphSpec, Profile, decoding
from mindomni_rt.bundle.manifest import sha256
from mindomni_rt.errors import MindOmniError, UnsupportedDeviceError
from mindomni_rt.files import parse_json, read_bytes, replace_file, write_text
from mindomni_rt.kernels.node import DOMAIN, NAME

from .cache import link

logger = logging.getLogger(__name__)
_REVISION = 2  # of this builder: raise it when the same ONNX would give another engine
_WORKSPACE = 8 << 30
Progress = Callable[[str, int, int], bool]
"""(phase, steps done, steps) -> go on? Called from the builder's thread."""


_SILENT = (
    "gave no reason. Usual causes: no GPU on this machine (`tensorrt` builds on the device), too little GPU memory "
    "(see `mindomni export plan`), or a driver older than the library. -v shows TensorRT's own log"
)


class EngineBuildError(MindOmniError, RuntimeError):
    """TensorRT refused a graph. The message carries its reason."""


@dataclass(frozen=True, kw_only=True)
class EngineReport:
    """What a build did. attention: how many layers, and whether they run as one fused kernel each."""

    seconds: float
    bytes: int
    attention: int
    fused: bool
    cached: bool = False


def fused_attention(dtype: str, head_dim: int) -> bool:
    """Whether TensorRT has one kernel for the attention: 16-bit types, head sizes 16 to 256 in steps of 16.

    By trial on TensorRT-RTX 1.7: 8, 264, 320, 384 and 512 are refused, float32 always. Sizes between the steps of 16
    build, but what runs then is not known, so they are declared decomposable.
    """
    return dtype in ("float16", "bfloat16") and 16 <= head_dim <= 256 and head_dim % 16 == 0


def build_engine(
    onnx: Path,
    out: Path,
    spec: GraphSpec,
    profile: Profile,
    *,
    dtype: str,
    runtime: str = "tensorrt_rtx",
    sms: Sequence[str] = (),
    cache: Path | None = None,
    progress: Progress | None = None,
) -> EngineReport:
    """Builds `out` from an ONNX file, streaming it to disk; the file appears whole or not at all.

    dtype: what the graph computes in. sms: architectures of the engine, for runtime "tensorrt_rtx"; "tensorrt" builds
    for the GPU at hand. cache: a folder of earlier engines, by hash of all that decides their bytes; None for none.
    Raises MissingExtraError, UnsupportedDeviceError, EngineBuildError.
    """
    trt = import_tensorrt(runtime)
    if runtime == "tensorrt" and (node := plugin_node(onnx)):
        _register(trt, spec, node, sms)
    kept = None if cache is None else cache / f"{_key(onnx, spec, profile, trt, sms)}.plan"
    note = None if kept is None else kept.with_suffix(".json")
    if kept is not None and note is not None and (earlier := _kept_report(kept, note)):
        link(kept, out)
        logger.info("%s: taken from %s", spec.name, kept)
        return earlier
    began = time.perf_counter()
    fused = not spec.head_dim or fused_attention(dtype, spec.head_dim)
    errors: list[str] = []
    attention = 0

    def write(temporary: Path) -> None:
        nonlocal attention
        attention = _build(trt, onnx, temporary, spec, profile, sms, fused, errors, progress)

    replace_file(out, write)
    report = EngineReport(
        seconds=round(time.perf_counter() - began, 2), bytes=out.stat().st_size, attention=attention, fused=fused
    )
    if kept is not None and note is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        link(out, kept)
        write_text(note, json.dumps({"sha256": sha256(kept), "report": asdict(report)}))
    return report


def _kept_report(kept: Path, note: Path) -> EngineReport | None:
    """The report of an engine that was kept; None without one, or where it or its note is damaged."""
    if not kept.exists():
        return None
    try:
        found = parse_json(read_bytes(note, 2**20))
        if found["sha256"] == sha256(kept):
            return EngineReport(**{**found["report"], "cached": True})
    except (OSError, ValueError, TypeError, KeyError):
        pass
    logger.warning("%s is damaged; the engine is built again", kept)
    return None


def _build(
    trt: Any,
    onnx: Path,
    out: Path,
    spec: GraphSpec,
    profile: Profile,
    sms: Sequence[str],
    fused: bool,
    errors: list[str],
    progress: Progress | None,
) -> int:
    """Parses, configures, builds. Returns the number of attention layers."""
    log = make_logger(trt, errors)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    graph = _with_fixed_axes(onnx, spec, profile, inline=trt.__name__ != "tensorrt")
    weights = MappedWeights(onnx.parent)  # the parser reads them there until the engine is built
    if not weights.parse(parser, graph, str(onnx)):
        said = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise EngineBuildError(f"{spec.name}: {trt.__name__} does not take the graph: {said}")
    attention = _declare_attention(trt, network, fused)
    if attention and not fused:
        logger.info("%s: head size %d has no fused attention; it is decomposed", spec.name, spec.head_dim)
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, _WORKSPACE)
    if spec.stage != "vae" and hasattr(trt.BuilderFlag, "TF32"):
        config.clear_flag(trt.BuilderFlag.TF32)  # float32 is asked for to check; the VAE is asked for fast pixels
    _target(trt, config, sms)
    config.add_optimization_profile(_shapes(builder, network, spec, profile))
    # TensorRT-RTX compiles for the sizes that it meets; TensorRT tunes kernels for those of its profiles.
    if trt.__name__ == "tensorrt" and (one := decoding(spec, profile)):
        config.add_optimization_profile(_shapes(builder, network, spec, one, profile))
    if progress is not None:
        config.progress_monitor = _monitor(trt, progress)
    built = _stream(trt, builder, network, config, out)
    if not built:
        raise _refusal(spec, sms, errors)
    return attention


class MappedWeights:
    """Data files of a graph as the page cache holds them. The parser's own way is to copy each tensor: of the full
    decoder in 16 bits 7 GB, which cannot be dropped like a mapped file's pages."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, NDArray[np.uint8]] = {}

    def parse(self, parser: Any, graph: bytes, path: str) -> bool:
        """Parses a graph whose larger tensors lie in the folder's files."""
        import onnx

        if not hasattr(parser, "load_initializer"):  # TensorRT before 10.8
            return bool(parser.parse(graph, path))
        if not parser.load_model_proto(graph, path):
            return False
        for tensor in onnx.load_from_string(graph).graph.initializer:
            place = {entry.key: entry.value for entry in tensor.external_data}
            if place and not parser.load_initializer(tensor.name, *self._where(place)):
                return False
        return bool(parser.parse_model_proto())

    def _where(self, place: Mapping[str, str]) -> tuple[int, int]:
        """Address and bytes of a tensor."""
        name = place["location"]
        if name not in self._files:
            try:
                self._files[name] = np.memmap(self._folder / name, np.uint8, "r")
            except (OSError, ValueError) as error:
                raise EngineBuildError(f"{name}: weights of the graph that cannot be read: {error}") from error
        begin = int(place.get("offset", 0))
        length = int(place.get("length", self._files[name].size - begin))
        if begin + length > self._files[name].size:
            raise EngineBuildError(f"{name} has {self._files[name].size} bytes; the graph reads up to {begin + length}")
        return self._files[name].ctypes.data + begin, length


def _with_fixed_axes(path: Path, spec: GraphSpec, profile: Profile, inline: bool) -> bytes:
    """The graph with axes of one size written into it: the parser wants a KV cache's capacity fixed.

    inline: write functions of our own domain out as standard operators, for a runtime without plugins.
    """
    import onnx
    import onnx.inliner

    model = onnx.load(str(path), load_external_data=False)
    if inline and model.functions:
        model = onnx.inliner.inline_local_functions(model)
    tensors = {t.name: t for t in spec.inputs + spec.outputs}
    for value in (*model.graph.input, *model.graph.output):
        least, _, most = profile.shapes(tensors[value.name])
        for dim, low, high in zip(value.type.tensor_type.shape.dim, least, most, strict=True):
            if low == high:
                dim.dim_value = low
    del model.graph.value_info[:]
    return model.SerializeToString()


def _declare_attention(trt: Any, network: Any, fused: bool) -> int:
    """Counts attention layers, and lets them decompose only where no fused kernel is expected."""
    count = 0
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_OUTPUT:
            count += 1
            if not fused:
                layer.__class__ = trt.IAttentionOutputLayer  # get_layer gives a bare ILayer
                layer.attention.decomposable = True
    return count


def _target(trt: Any, config: Any, sms: Sequence[str]) -> None:
    if not sms or not hasattr(trt, "ComputeCapability"):
        return
    config.num_compute_capabilities = len(sms)
    for index, sm in enumerate(sms):
        capability = getattr(trt.ComputeCapability, sm.upper().replace("_", ""), None)
        if capability is None or not config.set_compute_capability(capability, index):
            raise UnsupportedDeviceError(f"{trt.__name__} {trt.__version__} builds no engines for {sm}")


def _shapes(builder: Any, network: Any, spec: GraphSpec, profile: Profile, first: Profile | None = None) -> Any:
    """The optimization profile: ranges of the inputs that have free axes, in the first profile if not in this one."""
    shapes = builder.create_optimization_profile()
    inputs = {network.get_input(i).name for i in range(network.num_inputs)}
    for tensor in spec.inputs:
        if tensor.name not in inputs:
            raise EngineBuildError(f"{spec.name}: the graph has no input {tensor.name}")
        least, tuned, most = profile.shapes(tensor)
        free = (first or profile).shapes(tensor)
        if free[0] != free[2]:
            shapes.set_shape(tensor.name, least, tuned, most)
    return shapes


def _stream(trt: Any, builder: Any, network: Any, config: Any, out: Path) -> bool:
    """Writes the engine as it is made: the plan of the full decoder would otherwise be held in memory too."""
    with out.open("wb") as file:
        if not hasattr(trt, "IStreamWriter"):
            plan = builder.build_serialized_network(network, config)
            if plan is not None:
                file.write(plan)
            return plan is not None

        class Writer(trt.IStreamWriter):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                trt.IStreamWriter.__init__(self)

            def write(self, data: bytes) -> int:
                return file.write(data)

        return bool(builder.build_serialized_network_to_stream(network, config, Writer()))


def _monitor(trt: Any, progress: Progress) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            return progress(phase_name, step + 1, self.steps.get(phase_name, 0))

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

    return Monitor()


def _refusal(spec: GraphSpec, sms: Sequence[str], errors: list[str]) -> MindOmniError:
    """TensorRT's reason as one of our errors."""
    said = " ".join(" ".join(errors).split())
    where = ", ".join(sms) or "this GPU"
    if "not supported by a dedicated kernel" in said:
        return EngineBuildError(
            f"{spec.name}: no fused attention kernel for head size {spec.head_dim} on {where}, where one was expected. "
            f"TensorRT: {said[:300]}"
        )
    if "HW-specific datatypes" in said:
        return UnsupportedDeviceError(f"{spec.name}: {where} lacks a type that the graph uses. TensorRT: {said[:300]}")
    return EngineBuildError(f"{spec.name}: no engine for {where}. TensorRT: {said[:600] or _SILENT}")


def _key(onnx: Path, spec: GraphSpec, profile: Profile, trt: Any, sms: Sequence[str]) -> str:
    """Hash of everything that decides an engine's bytes."""
    files = [onnx, *(onnx.parent / name for name in external_files(onnx))]
    parts = {
        "revision": _REVISION,
        "files": [sha256(f) for f in files],
        "spec": repr(spec),
        "profile": sorted(profile.ranges.items()),
        "runtime": [trt.__name__, trt.__version__],
        "sms": sorted(sms) or _this_gpu(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _this_gpu() -> str:
    """Name of the GPU that "tensorrt" would build for."""
    from cuda.core import Device

    return str(Device().name)


def plugin_node(onnx: Path) -> dict[str, int] | None:
    """Heads of the graph's `mindomni::SegmentAttention` nodes, None for a graph without."""
    import onnx as onnx_package

    model = onnx_package.load(str(onnx), load_external_data=False)
    found = next((n for n in model.graph.node if n.domain == DOMAIN and n.op_type == NAME), None)
    if found is None:
        return None
    shapes = {v.name: v.type.tensor_type.shape.dim for v in model.graph.input}
    return {"heads": shapes["keys"][2].dim_value, "head_dim": shapes["keys"][4].dim_value}


def _register(trt: Any, spec: GraphSpec, node: dict[str, int], sms: Sequence[str]) -> None:
    """Our attention kernel for TensorRT, as machine code inside the engine."""
    import importlib
    from importlib.util import find_spec

    from mindomni_rt.errors import MissingExtraError
    from mindomni_rt.extras import install

    if find_spec("triton") is None:
        raise MissingExtraError("triton", "fast", f"--attention triton compiles our kernel with it: {install('fast')}")
    from mindomni_rt.kernels.tensorrt_plugin import register

    if len(sms) != 1:
        raise EngineBuildError(f"{spec.name}: --attention triton builds for one architecture, not for {', '.join(sms)}")
    logger.warning(
        "%s: attention is our Triton kernel through tensorrt.plugin. No engine with it has been run yet: check this "
        "one with `mindomni export verify`",
        spec.name,
    )
    heads = node["heads"]
    plugins = importlib.import_module("tensorrt.plugin")
    try:
        register(trt, plugins, int(sms[0].removeprefix("sm_")), node["head_dim"], heads, heads)
    except ValueError as error:
        raise EngineBuildError(f"{spec.name}: --attention triton: {error}") from error


def external_files(onnx: Path) -> list[str]:
    """Names of the data files that an ONNX graph refers to."""
    import onnx as onnx_package

    model = onnx_package.load(str(onnx), load_external_data=False)
    tensors = model.graph.initializer
    return sorted({e.value for t in tensors for e in t.external_data if e.key == "location"})
