"""Weights files that torch wrote with pickle."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..errors import BadCheckpointError


def read_pickled(path: Path) -> dict[str, Tensor]:
    """model.pt as tensors; nothing in it is executed (weights_only) and it stays mapped to the file."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, … for a damaged file
        raise BadCheckpointError(f"{path} is not a readable weights file: {str(error).splitlines()[0]}") from error
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise BadCheckpointError(f"{path}: expected a flat dictionary of tensors")
    return state
