"""Files that commands write: checked before the work, written whole, errors by name."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mindomni_rt.errors import BadRequestError, MindOmniError
from mindomni_rt.files import replace_file
from mindomni_rt.outputs import check_target

from .errors import StorageError

if TYPE_CHECKING:
    from torch import Tensor

    from mindomni_rt.model.mindomni import MindOmniModel


def check_model_folder(folder: Path) -> None:
    """Raises BadRequestError for a folder that holds something other than a checkpoint: its files would be replaced.

    StorageError where no file can be written.
    """
    check_target(folder / "connector.safetensors", "FOLDER")
    if any(folder.iterdir()) and not (folder / "connector.safetensors").exists():
        raise BadRequestError(f"{folder} holds files that are no checkpoint: expected a new or empty folder")


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
