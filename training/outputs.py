"""Files that commands write: checked before the work, written whole, errors by name."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mindomni_rt.errors import BadRequestError, MindOmniError
from mindomni_rt.files import replace_file, try_file

from .errors import StorageError

if TYPE_CHECKING:
    from torch import Tensor

    from mindomni_rt.model.mindomni import MindOmniModel


def check_target(path: Path, option: str = "--out") -> None:
    """Raises BadRequestError or StorageError if a file cannot be written at `path`; makes its folder."""
    if path.is_dir():
        raise BadRequestError(f"{option} {path}: is a folder, expected the name of a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try_file(path)
    except OSError as error:
        raise StorageError(f"{option} {path}: {error.strerror or error}") from error


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file; makes the folder. Raises StorageError."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    state = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, lambda temporary: save_file(state, str(temporary), metadata))
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{path} could not be written: {write_failure(error)}") from error


def save_checkpoint(model: MindOmniModel, out: Path, source: Path | None = None) -> None:
    """`save_model`, whose errors for a full disk or a read-only folder become StorageError."""
    from safetensors import SafetensorError

    from mindomni_rt.model.save import save_model

    try:
        save_model(model, out, source=source)
    except MindOmniError as error:
        if not isinstance(error.__cause__, (OSError, SafetensorError)):
            raise
        raise StorageError(f"model {out} could not be written: {write_failure(error.__cause__)}") from error
    except (OSError, SafetensorError) as error:
        raise StorageError(f"model {out} could not be written: {write_failure(error)}") from error


def write_failure(error: Exception) -> str:
    """Why a file could not be written, in one line. torch and safetensors wrap the system's error in their own."""
    causes = [error, error.__context__, error.__cause__]
    if any(getattr(e, "errno", None) == errno.ENOSPC for e in causes) or "No space left" in str(error):
        return "the disk is full"
    system = next((e.strerror for e in causes if isinstance(e, OSError) and e.strerror), None)
    return system or (str(error).splitlines() or [type(error).__name__])[0]
