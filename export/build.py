"""From a checkpoint to a bundle: graphs, then engines where the target wants them, then the manifest."""

from __future__ import annotations

import gc
import logging
import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import mindomni_rt
from mindomni_rt.backends.compiled.trt_module import import_tensorrt
from mindomni_rt.bundle.contracts import GraphSpec, Profile, graph_specs, profile
from mindomni_rt.bundle.manifest import GraphEntry, Manifest, hash_files, write_manifest, writing
from mindomni_rt.errors import MissingExtraError
from mindomni_rt.memory.precision import KINDS, kind
from mindomni_rt.model.dtypes import DTYPES
from mindomni_rt.model.mindomni import MindOmniModel, load_model

from . import engines, quantize
from .graphs import available, export_graph, halve_attention
from .store import WeightStore
from .targets import Choice, Target
from .weights import bytes_by_type, check_weights, promise, read_weights

logger = logging.getLogger(__name__)
# Graphs that share a data file, because they share weights.
_DATA = {
    "vision": "vision",
    "language": "language",
    "choose": "language",
    "connector": "connector",
    "features": "connector",
    "prefix": "decoder",
    "denoiser": "decoder",
    "denoiser_first": "decoder",
    "update": "decoder",
    "vae": "vae",
    "vae_encode": "vae",
}
_FLOAT32 = ("choose", "update")  # arithmetic on a few numbers, without weights
_FILES = (".json", ".txt", ".jinja", ".model")


@dataclass(frozen=True, kw_only=True)
class BuildRequest:
    """What to build. prompts: for calibration, at `calibration_size` pixels. condition_only: also the engine of that
    first step, which doubles the denoiser on disk (ONNX graphs share their weights, so there it is always built).
    attention: "native" is the runtime's own; "triton" puts our kernel into engines of `tensorrt`, while onnxruntime and
    TensorRT-RTX run what it means in standard operators."""

    checkpoint: Path
    out: Path
    target: Target
    choice: Choice
    profile: str = "1024"
    condition_only: bool = False
    attention: str = "native"
    prompts: Sequence[str] = quantize.DEFAULT_PROMPTS
    calibration_size: int | None = None
    cache: Path | None = None
    overwrite: bool = False
    progress: engines.Progress | None = field(default=None, compare=False)


def build(request: BuildRequest) -> Manifest:
    """Builds a bundle; it appears under its name whole or not at all.

    Raises BadCheckpointError, BadBundleError (the name is taken), MissingExtraError, UnsupportedDeviceError,
    EngineBuildError, BuildError (a graph holds other types than the manifest would say), OSError (a full disk).
    """
    target, choice = request.target, request.choice
    runtime_version = _runtime_version(target.runtime)
    with writing(request.out, request.overwrite) as folder:
        model = _load(request)
        config = model.config
        specs = graph_specs(config)
        names = [n for n in available(model) if _wanted(n, request)]
        work = folder if target.runtime == "onnx" else folder / ".onnx"
        work.mkdir(exist_ok=True)
        reports = _graphs(model, names, request, work)
        del model
        gc.collect()
        sizes = profile(request.profile, config)
        if target.runtime == "onnx":
            entries = {n: _entry(specs[n], choice, work / f"{n}.onnx", reports[n]) for n in names}
            sizes = Profile(name="any")  # onnxruntime takes any size
        else:
            entries = {n: _engine(specs[n], request, work, folder, sizes, reports[n]) for n in names}
            shutil.rmtree(work)
        _copy_text(request.checkpoint, folder)
        manifest = Manifest(
            model=config,
            runtime=target.runtime,
            runtime_version=runtime_version,
            targets=target.sms,
            dtype=choice.dtype,
            profile=sizes,
            graphs=entries,
            files=hash_files(folder),
            built_by=_builder(),
        )
        write_manifest(folder, manifest)
    return manifest


def _load(request: BuildRequest) -> MindOmniModel:
    vae = request.choice.stages["vae"]
    vae_dtype = torch.float32 if vae == "mixed" else DTYPES[kind(vae).name]
    model, report = load_model(request.checkpoint, DTYPES[request.choice.dtype], vae_dtype=vae_dtype)
    logger.info("%s", report)
    return model


def _wanted(name: str, request: BuildRequest) -> bool:
    onnx = request.target.runtime == "onnx"
    return name != "denoiser_first" or onnx or request.condition_only


def _graphs(model: MindOmniModel, names: Sequence[str], request: BuildRequest, work: Path) -> dict[str, dict[str, Any]]:
    """Traces every graph into `work`. Returns what quantization did to each."""
    choice = request.choice
    ranges: Mapping[str, float] = {}
    if any(p in quantize.CALIBRATED for p in choice.stages.values()):
        logger.info("calibrating on %d prompts", len(request.prompts))
        ranges = quantize.calibrate(model, request.checkpoint, request.prompts, request.calibration_size)
    if choice.stages["vae"] == "mixed":
        halve_attention(model)
    specs = graph_specs(model.config)
    reports: dict[str, dict[str, Any]] = {}
    stores: dict[str, WeightStore] = {}
    try:
        for name in names:
            precision = _precision(specs[name], choice)
            report: dict[str, Any] = {}

            def change(traced: Any, precision: str = precision, report: dict[str, Any] = report) -> None:
                report.update(quantize.quantize(traced, precision, ranges).to_dict())

            began = time.perf_counter()
            if _DATA[name] not in stores:
                stores[_DATA[name]] = WeightStore(work / f"{_DATA[name]}.data")
            store = stores[_DATA[name]]
            quantized = precision in quantize.PASSES
            file = export_graph(
                model, name, choice.dtype, work, store, change if quantized else None, request.attention
            )
            report |= _held(specs[name], file, choice)
            report["export_seconds"] = round(time.perf_counter() - began, 2)
            reports[name] = report
            logger.info("%s: traced in %.1f s", name, report["export_seconds"])
    finally:
        for store in stores.values():
            store.close()
    return reports


def _held(spec: GraphSpec, file: Path, choice: Choice) -> dict[str, Any]:
    """What the written graph holds, for the manifest. Raises BuildError where that is not what was asked for."""
    found = read_weights(file)
    promised = promise(spec, _precision(spec, choice), _attention_dtype(spec, choice))
    check_weights(spec, found, promised)
    return {"weights": promised, "bytes_by_type": bytes_by_type(found)}


def _precision(spec: GraphSpec, choice: Choice) -> str:
    """What a graph's matrices are stored in. Graphs beside a stage's own hold no large ones."""
    plain = KINDS[choice.dtype].short
    if spec.name in _FLOAT32:
        return "fp32"
    return plain if spec.name == "features" else choice.stages[spec.stage]


def _entry(spec: GraphSpec, choice: Choice, file: Path, report: dict[str, Any]) -> GraphEntry:
    data = tuple(engines.external_files(file)) if file.suffix == ".onnx" else ()
    held = sum((file.parent / d).stat().st_size for d in data)
    return GraphEntry(
        stage=spec.stage,
        file=file.name,
        precision=_precision(spec, choice),
        dtype=_attention_dtype(spec, choice),
        data=data,
        report={**report, "bytes": file.stat().st_size + held},
    )


def _attention_dtype(spec: GraphSpec, choice: Choice) -> str:
    """The type in which a graph's attention computes."""
    if spec.stage != "vae":
        return "float32" if spec.name in _FLOAT32 else choice.dtype
    return {"fp32": "float32", "bf16": "bfloat16"}.get(choice.stages["vae"], "float16")


def _engine(
    spec: GraphSpec, request: BuildRequest, work: Path, folder: Path, sizes: Profile, report: dict[str, Any]
) -> GraphEntry:
    out = folder / f"{spec.name}.plan"
    built = engines.build_engine(
        work / f"{spec.name}.onnx",
        out,
        spec,
        sizes,
        dtype=_attention_dtype(spec, request.choice),
        runtime=request.target.runtime,
        sms=request.target.sms,
        cache=request.cache,
        progress=request.progress,
    )
    logger.info("%s: %.1f MB in %.1f s", spec.name, built.bytes / 1e6, built.seconds)
    more = {"build_seconds": built.seconds, "attention": built.attention, "fused_attention": built.fused}
    entry = _entry(spec, request.choice, out, {**report, **more})
    return replace(entry, file=out.name)


def _copy_text(checkpoint: Path, folder: Path) -> None:
    """Tokenizer, chat template and preprocessing files: all that is left of the checkpoint."""
    (folder / "mllm").mkdir()
    for path in sorted((checkpoint / "mllm").iterdir()):
        if path.suffix in _FILES and ".index." not in path.name:
            shutil.copyfile(path, folder / "mllm" / path.name)


def _runtime_version(runtime: str) -> str:
    """Version of the library that will read the bundle; its absence is an error before any work."""
    if runtime != "onnx":
        return str(import_tensorrt(runtime).__version__)
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("onnxruntime", "export") from error
    return str(onnxruntime.__version__)


def _builder() -> dict[str, Any]:
    import onnx

    return {
        "mindomni_rt": mindomni_rt.__version__,
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
