"""`load`: a folder or hub id → a pipeline on the right backend."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .checkpoint import resolve
from .errors import BadRequestError, MissingExtraError

if TYPE_CHECKING:
    from .pipeline import Pipeline

BACKENDS = ("auto", "torch")


def load(
    path_or_repo_id: str | Path,
    *,
    backend: str = "auto",
    device: str = "auto",
    dtype: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Pipeline:
    """Loads a checkpoint in the published layout.

    path_or_repo_id: a folder, or a hub id, for which revision, token and local_files_only mean what they do in
    huggingface_hub. device: "auto", "cpu", "cuda", "cuda:N". dtype by name; None is bfloat16 on CUDA and float32 on
    the CPU. Raises BadCheckpointError, UnsupportedDeviceError, MissingExtraError.
    """
    if backend not in BACKENDS:
        raise BadRequestError(f"backend {backend!r}: expected one of {', '.join(BACKENDS)}")
    folder = resolve(path_or_repo_id, revision, token, local_files_only)
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("torch", "torch") from error
    from .backends.torch import load_torch
    from .pipeline import Pipeline

    return Pipeline(load_torch(folder, device, dtype), folder)
