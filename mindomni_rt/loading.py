"""`load`: a folder or hub id → a pipeline on the right backend."""

from __future__ import annotations

import logging
import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from .bundle.contracts import STAGES
from .bundle.manifest import Manifest, is_bundle, read_manifest
from .checkpoint.hub import resolve
from .checks import shown
from .errors import BadRequestError, MissingExtraError
from .memory.footprint import Precision
from .memory.layers import PART_OF
from .memory.planner import parse_bytes, plan

if TYPE_CHECKING:
    from .pipeline import Pipeline

logger = logging.getLogger(__name__)
BACKENDS = ("auto", "torch", "onnx", "tensorrt")


def load(
    path_or_repo_id: str | Path,
    *,
    backend: str = "auto",
    device: str = "auto",
    dtype: str | None = None,
    precision: str | None = None,
    memory_budget: str | float | None = None,
    fast: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Pipeline:
    """Loads a checkpoint in the published layout, or a bundle that `python -m export build` made of one.

    A bundle names its own runtime (onnxruntime or TensorRT) and type, and needs no torch; backend and dtype may only
    agree with it. memory_budget: "8GiB" or bytes; parts of the model that do not fit at once take turns.
    precision (torch on CUDA): "fp8", "int8", "int4" or pairs such as "decoder=fp8,attention=int8" (`precision`). With a
    memory_budget and no precision, the most exact one that fits is taken and logged. fast: our kernels and CUDA graphs;
    None is on for CUDA.
    path_or_repo_id: a folder, or a hub id, for which revision, token and local_files_only mean what they do in
    huggingface_hub. device: "auto", "cpu", "cuda", "cuda:N". dtype by name; None is bfloat16 on CUDA and float32 on
    the CPU. Raises BadCheckpointError, BadBundleError, UnsupportedDeviceError, MissingExtraError.
    """
    if backend not in BACKENDS:
        raise BadRequestError(f"backend {shown(backend)}: expected one of {', '.join(BACKENDS)}")
    if not isinstance(device, str) or not re.fullmatch(r"[a-z]+(:\d{1,3})?", device):
        raise BadRequestError(f"device {shown(device)}: expected auto, cpu, cuda or cuda:N")
    folder = resolve(path_or_repo_id, revision, token, local_files_only)
    if is_bundle(folder):
        if precision is not None or fast is not None:
            raise BadRequestError(
                f"{folder} is a bundle: its precision was chosen at export; leave precision and fast out"
            )
        return _load_bundle(folder, backend, device, dtype, memory_budget)
    if backend not in ("auto", "torch"):
        raise BadRequestError(
            f"{folder} is a checkpoint, which the torch backend runs; for backend {backend!r} build a bundle of it: "
            f"python -m export build {folder} --target cpu --out BUNDLE"
        )
    if find_spec("torch") is None:
        raise MissingExtraError("torch", "torch")
    from .backends.torch.backend import choose_device, load_torch
    from .pipeline import Pipeline

    device, dtype = choose_device(device, dtype)
    if fast or (fast is None and device.startswith("cuda")):
        from .backends.fast.load import load_fast

        return Pipeline(load_fast(folder, device, dtype, precision, memory_budget), folder)
    if precision is not None or memory_budget is not None:
        raise BadRequestError("precision and memory_budget need the fast path: device='cuda', or fast=True")
    return Pipeline(load_torch(folder, device, dtype), folder)


def _load_bundle(
    folder: Path, backend: str, device: str, dtype: str | None, memory_budget: str | float | None
) -> Pipeline:
    from .pipeline import Pipeline

    manifest = read_manifest(folder)
    kind = "onnx" if manifest.runtime == "onnx" else "tensorrt"
    if backend not in ("auto", kind):
        raise BadRequestError(f"{folder} is a bundle for backend {kind!r}, not {backend!r}")
    if dtype not in (None, manifest.dtype):
        raise BadRequestError(f"{folder} computes in {manifest.dtype}; for {dtype} build another bundle")
    if kind == "onnx":
        from .backends.compiled.onnx import load_onnx

        return Pipeline(load_onnx(folder, device, cpu_threads(), resident=_resident(manifest, memory_budget)), folder)
    from .backends.compiled.trt import load_tensorrt

    return Pipeline(load_tensorrt(folder, device, resident=_resident(manifest, memory_budget)), folder)


def cpu_threads() -> int:
    """Threads of one operator on the CPU: OMP_NUM_THREADS, of which a list names the outermost level first, else the
    cores that this process may use. A value that is no number counts as absent, as OpenMP has it."""
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if first.isdecimal() and 0 < int(first[:6]) < 10_000:
        return int(first)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _resident(manifest: Manifest, memory_budget: str | float | None) -> tuple[str, ...]:
    """Stages that stay loaded within a budget; all of them without one."""
    if memory_budget is None:
        return STAGES
    found = plan(manifest.model, precision=stored_as(manifest), budget=parse_bytes(memory_budget))
    stays = [s for s in STAGES if PART_OF[s] in found.resident]
    if manifest.runtime != "onnx" and "prefix" in stays:
        # Its engine is a second copy of the decoder's weights, which the plan does not count.
        stays.remove("prefix")
    logger.info("memory budget %s: %s", memory_budget, found.summary())
    return tuple(stays)


def stored_as(manifest: Manifest) -> Precision:
    """A bundle's precisions in the planner's terms."""
    stages = {graph.stage: graph.precision for name, graph in manifest.graphs.items() if name == graph.stage}
    return Precision.of_stages(stages, manifest.dtype)
