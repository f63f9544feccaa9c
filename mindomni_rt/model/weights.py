"""Reads the tensors that a checkpoint's index names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint.headers import TensorEntry
from ..errors import BadCheckpointError

FLOATS = ("F32", "F16", "BF16", "F64")


def read_tensors(
    entries: Mapping[str, TensorEntry], dtype: torch.dtype | None, device: torch.device | str
) -> dict[str, Tensor]:
    """The tensors by the given names; dtype None keeps the stored type. Raises BadCheckpointError."""
    from safetensors import SafetensorError, safe_open

    state: dict[str, Tensor] = {}
    for path in sorted({e.file for e in entries.values()}):
        here = {name: e for name, e in entries.items() if e.file == path}
        if path.suffix == ".pt":
            tensors = read_pickled(path)
            state.update({name: tensors[e.key].to(device, dtype) for name, e in here.items()})
            continue
        try:
            with safe_open(path, framework="pt") as file:
                state.update({name: file.get_tensor(e.key).to(device, dtype) for name, e in here.items()})
        except (SafetensorError, OSError) as error:
            raise BadCheckpointError(f"{path} could not be read: {error}") from error
    return state


def read_pickled(path: Path) -> dict[str, Tensor]:
    """model.pt as tensors; nothing in it is executed (weights_only) and it stays mapped to the file."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, … for a damaged file
        raise BadCheckpointError(f"{path} is not a readable weights file: {str(error).splitlines()[0]}") from error
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise BadCheckpointError(f"{path}: expected a flat dictionary of tensors")
    return state
