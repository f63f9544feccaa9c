"""`load`: a folder or hub id → a pipeline on the right backend."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from .bundle.manifest import is_bundle, read_manifest
from .checkpoint.hub import resolve
from .checks import shown
from .errors import BadCheckpointError, BadRequestError, MissingExtraError
from .memory.choose import choose_bundle, choose_checkpoint
from .memory.guard import named_memory_errors

if TYPE_CHECKING:
    from .pipeline import Pipeline

BACKENDS = ("auto", "torch", "onnx", "tensorrt")


def load(
    path_or_repo_id: str | Path,
    *,
    backend: str = "auto",
    device: str = "auto",
    dtype: str | None = None,
    precision: str | None = None,
    memory_budget: str | float | None = "auto",
    fast: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Pipeline:
    """Loads a checkpoint in the published layout, or a bundle that `mindomni export build` made of one.

    A bundle names its own runtime (onnxruntime or TensorRT) and type, and needs no torch; backend and dtype may only
    agree with it. memory_budget: "auto" is what is free now, "8GiB" or bytes no more than that, None does not look;
    parts of the model that do not fit at once take turns, and what cannot fit is an error before anything is read.
    precision (torch on CUDA): "fp8", "fp8fast", "int8", "int4" or pairs such as "decoder=fp8,attention=int8"
    (`precision`). With a memory_budget and no precision, the most exact one that fits is taken and logged. fast: our
    kernels and CUDA graphs; None is on for CUDA.
    path_or_repo_id: a folder; "demo", the small model of the package; or a hub id, for which revision, token and
    local_files_only mean what they do in huggingface_hub. device: "auto", "cpu", "cuda", "cuda:N". dtype by name; None
    is bfloat16 on CUDA (float16 before Ampere); on a CPU the stored type, computed in float32 where the CPU has no fast
    products of it. Raises BadCheckpointError, BadBundleError, OutOfMemoryError, UnsupportedDeviceError,
    MissingExtraError.
    """
    if backend not in BACKENDS:
        raise BadRequestError(f"backend {shown(backend)}: expected one of {', '.join(BACKENDS)}")
    if not isinstance(device, str) or not re.fullmatch(r"[a-z]+(:\d{1,3})?", device):
        raise BadRequestError(f"device {shown(device)}: expected auto, cpu, cuda or cuda:N")
    folder = resolve(path_or_repo_id, revision, token, local_files_only, checkpoint=backend == "torch" or bool(fast))
    if is_bundle(folder):
        if precision is not None or fast is not None:
            raise BadRequestError(
                f"{folder} is a bundle: its precision was chosen at export; leave precision and fast out"
            )
        return _load_bundle(folder, backend, device, dtype, memory_budget)
    if backend not in ("auto", "torch") or find_spec("torch") is None:
        from .checkpoint.layout import open_checkpoint

        open_checkpoint(folder)  # what is no model is refused as such, before a model lacks a package
    if backend not in ("auto", "torch"):
        raise BadRequestError(
            f"{folder} is a checkpoint, which the torch backend runs; for backend {backend!r} build a bundle of it: "
            f"mindomni export build {folder} --target cpu --out BUNDLE"
        )
    if find_spec("torch") is None:
        raise MissingExtraError("torch", "torch")
    from .backends.torch.backend import choose_device, load_torch
    from .pipeline import Pipeline

    found = choose_checkpoint(
        folder, device=device, dtype=dtype, precision=precision, memory_budget=memory_budget, fast=fast
    )
    with named_memory_errors(f"loading {folder}", "Close other programs, or load with precision='int4' or a bundle"):
        device, dtype = choose_device(found.device, found.dtype)
        if fast or (fast is None and device.startswith("cuda")):
            from .backends.fast.load import load_fast

            return Pipeline(load_fast(folder, device, dtype, found.precision, found.budget), folder, found)
        if found.precision is not None or found.budget is not None:
            raise BadRequestError("precision and memory_budget need the fast path: device='cuda', or fast=True")
        return Pipeline(load_torch(folder, device, dtype), folder, found)


def resolve_checkpoint(path_or_repo_id: str | Path) -> Path:
    """The folder of a checkpoint, for what needs its weights: export, training, the torch backend's options.

    A folder, a hub id, or "demo": the small model's. Raises BadCheckpointError, for a bundle too.
    """
    folder = resolve(path_or_repo_id, checkpoint=True)
    if is_bundle(folder):
        raise BadCheckpointError(
            f"{path_or_repo_id} is a bundle; expected the checkpoint that bundles are built of: a folder, a hub id, or "
            "demo (the small model's)"
        )
    return folder


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
        from .backends.compiled.providers import resolve_device

        found = choose_bundle(folder, manifest, device=resolve_device(device), memory_budget=memory_budget)
        return Pipeline(load_onnx(folder, found.device, resident=found.stays or ()), folder, found)
    from .backends.compiled.trt import load_tensorrt

    on = "cuda" if device == "auto" else device

    def resident() -> tuple[str, ...]:
        return choose_bundle(folder, manifest, device=on, memory_budget=memory_budget).stays or ()

    return Pipeline(load_tensorrt(folder, device, resident), folder)
