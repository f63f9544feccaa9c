"""A build at published width with random weights: how long it takes and what memory it needs, on the machine at hand.

Weights decide nothing about either, so this answers before a download of 25 GB whether a build will fit.
"""

from __future__ import annotations

import gc
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from mindomni_rt.backends.compiled.trt_module import import_tensorrt
from mindomni_rt.bundle.contracts import graph_specs, profile
from mindomni_rt.checkpoint.config import ModelConfig, published
from mindomni_rt.errors import BadRequestError
from mindomni_rt.model.dtypes import DTYPES
from mindomni_rt.model.mindomni import MindOmniModel

from . import quantize
from .engines import build_engine
from .record import append, watching
from .store import WeightStore, write_graph
from .targets import Target, choose
from .traces import Traces, fill

PARTS = {"language": ("language",), "connector": ("connector",), "decoder": ("denoiser", "prefix"), "vae": ("vae",)}


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """What one graph took. Memory in bytes: peak of the process's own pages while tracing and while building."""

    graph: str
    layers: int
    target: str
    precision: str
    parameters: int
    export_seconds: float
    export_peak: int
    build_seconds: float
    build_peak: int
    engine_bytes: int
    fused_attention: bool


def rehearse(
    part: str, target: Target, *, layers: int | None = None, precision: str = "bf16", folder: Path | None = None
) -> list[Rehearsal]:
    """Traces and builds the graphs of one part of the published model, cut to `layers` layers (None: all of them).

    folder: for the traced weights and engines, which are removed again. precision: "bf16", "fp16", or a weight-only
    one ("int4", "int8wo"). Raises BadRequestError, UnsupportedDeviceError, EngineBuildError.
    """
    if part not in PARTS:
        raise BadRequestError(f"part {part!r}: expected one of {', '.join(PARTS)}")
    if precision in quantize.CALIBRATED:
        raise BadRequestError(
            f"precision {precision}: random weights cannot be calibrated; use bf16, fp16, int8wo or int4"
        )
    import_tensorrt(target.runtime)
    choice = choose(target, precision)
    config = _cut(published(), part, layers)
    out = []
    with tempfile.TemporaryDirectory(dir=folder) as name:
        work = Path(name)
        model = _random(config, part, DTYPES[choice.dtype])
        count = sum(p.numel() for p in getattr(model, part).parameters())
        traced = {}
        with WeightStore(work / f"{part}.data") as store:
            for graph in PARTS[part]:
                traced[graph] = _trace(model, graph, choice.dtype, precision, work, store)
        del model
        gc.collect()
        for graph in PARTS[part]:
            with watching() as peak:
                built = build_engine(
                    work / f"{graph}.onnx",
                    work / f"{graph}.plan",
                    graph_specs(config)[graph],
                    profile("1024", config),
                    dtype="float32" if part == "vae" else choice.dtype,
                    runtime=target.runtime,
                    sms=target.sms,
                )
            seconds, export_peak = traced[graph]
            out.append(
                Rehearsal(
                    graph=graph,
                    layers=_layers(config, part),
                    target=",".join(target.sms),
                    precision=precision,
                    parameters=count,
                    export_seconds=round(seconds, 1),
                    export_peak=export_peak,
                    build_seconds=built.seconds,
                    build_peak=peak["bytes"],
                    engine_bytes=built.bytes,
                    fused_attention=built.fused,
                )
            )
            (work / f"{graph}.plan").unlink()
    return out


def _trace(
    model: MindOmniModel, graph: str, dtype: str, precision: str, work: Path, store: WeightStore
) -> tuple[float, int]:
    began = time.perf_counter()
    with watching() as peak:
        traced, _ = Traces(model, dtype, "fp32").get(graph)
        fill(traced, model, graph)
        if precision in quantize.PASSES:
            quantize.quantize(traced, precision, {}, store)
        write_graph(traced, work / f"{graph}.onnx", store)
    return time.perf_counter() - began, peak["bytes"]


def _cut(config: ModelConfig, part: str, layers: int | None) -> ModelConfig:
    if layers is None:
        return config
    if part == "vae":
        raise BadRequestError("layers: the vae is built whole; leave it out")
    owner = getattr(config, part)
    if not 1 <= layers <= owner.stack.num_layers:
        raise BadRequestError(f"layers = {layers}: expected 1 to {owner.stack.num_layers}")
    return replace(config, **{part: replace(owner, stack=replace(owner.stack, num_layers=layers))})


def _layers(config: ModelConfig, part: str) -> int:
    return 0 if part == "vae" else int(getattr(config, part).stack.num_layers)


def _random(config: ModelConfig, part: str, dtype: torch.dtype) -> MindOmniModel:
    """The model with one part in memory, its weights drawn; the others stay on the meta device."""
    with torch.device("meta"):
        model = MindOmniModel(config)
    dtype = torch.float32 if part == "vae" else dtype
    module = getattr(model, part).to(dtype).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data.normal_(0.0, 0.02, generator=generator)
    return model.eval().requires_grad_(False)


def record(rows: list[Rehearsal], path: Path) -> None:
    """Writes rows as JSON with date and versions; a file that is there gets them appended."""
    import tensorrt_rtx

    versions = {"torch": torch.__version__, "tensorrt_rtx": tensorrt_rtx.__version__}
    run = {"versions": versions, "graphs": [asdict(row) for row in rows]}
    append("builds at published width with random weights; no GPU", run, path)


def table(rows: list[Rehearsal]) -> str:
    """Rows as aligned text."""
    lines = [
        f"{'graph':10} {'layers':>6} {'target':8} {'precision':9} {'M params':>8} {'trace s':>8} {'GB':>6} "
        f"{'build s':>8} {'GB':>6} {'engine GB':>10}  attention"
    ]
    for r in rows:
        lines.append(
            f"{r.graph:10} {r.layers:6} {r.target:8} {r.precision:9} {r.parameters / 1e6:8.0f} {r.export_seconds:8.1f} "
            f"{r.export_peak / 1e9:6.2f} {r.build_seconds:8.1f} {r.build_peak / 1e9:6.2f} "
            f"{r.engine_bytes / 1e9:10.3f}  {'fused' if r.fused_attention else 'decomposed'}"
        )
    return "\n".join(lines)
