"""Training checkpoints: written whole or not at all, the newest `keep` kept, resumed bit for bit.

    run/checkpoints/step-00000500/state.pt   trained weights, optimizer, EMA, step, data position

Every random number of a step derives from (seed, step), so no generator is stored. Frozen weights are read from the
model that the run started from, whose checksum is stored.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mindomni_rt.errors import BadCheckpointError
from mindomni_rt.files import replace_file

from ..errors import StorageError
from ..outputs import write_failure

_NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class State:
    """A run after `step` steps. weights, ema and optimizer by parameter name; fingerprint: what must not change."""

    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    ema: dict[str, Tensor]
    data: Any
    fingerprint: dict[str, Any]


def full_tensor(tensor: Tensor, keep: bool = True) -> Tensor:
    """A copy on the CPU, gathered if it is sharded: all processes must call; those with `keep` get the values."""
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().cpu().clone() if keep else torch.empty(0)


def capture(
    step: int,
    trained: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    ema: Mapping[str, Tensor],
    data: Any,
    fingerprint: Mapping[str, Any],
    keep: bool = True,
) -> State:
    """The state of a run. Sharded tensors are gathered one at a time; only a process that keeps them holds them all."""
    moments = {
        name: {k: full_tensor(v, keep) if isinstance(v, Tensor) else v for k, v in optimizer.state.get(p, {}).items()}
        for name, p in trained.items()
    }
    return State(
        step,
        {n: full_tensor(p, keep) for n, p in trained.items()},
        moments,
        {n: full_tensor(t, keep) for n, t in ema.items()},
        data,
        dict(fingerprint),
    )


def restore(
    state: State, trained: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, ema: dict[str, Tensor]
) -> None:
    """Puts a state back, bit for bit. Raises BadCheckpointError if it belongs to other parameters."""
    if set(state.weights) != set(trained):
        odd = sorted(set(state.weights) ^ set(trained))[0]
        raise BadCheckpointError(f"the checkpoint trains other parameters than this run ({odd}); use a new `out`")
    with torch.no_grad():
        for name, parameter in trained.items():
            if tuple(state.weights[name].shape) != tuple(parameter.shape):
                raise BadCheckpointError(
                    f"{name}: {tuple(state.weights[name].shape)} in the checkpoint, {tuple(parameter.shape)} here"
                )
            parameter.copy_(_like(state.weights[name], parameter))
            optimizer.state[parameter] = {
                k: (_like(v, parameter) if v.ndim else v.clone()) if isinstance(v, Tensor) else v
                for k, v in state.optimizer[name].items()
            }
        for name in ema:
            ema[name].copy_(_like(state.ema[name], ema[name]))


def _like(value: Tensor, target: Tensor) -> Tensor:
    """A whole tensor in the layout of a (perhaps sharded) one."""
    if not hasattr(target, "device_mesh"):
        return value.to(target.device, copy=True)
    from torch.distributed.tensor import DTensor, distribute_tensor

    sharded: Any = target
    assert isinstance(sharded, DTensor)
    return distribute_tensor(value.to(target.device), sharded.device_mesh, sharded.placements)


def save(folder: Path, state: State, keep: int) -> Path:
    """Writes a checkpoint beside the others, then removes all but the newest `keep`.

    Raises StorageError if the disk is full or not writable; the earlier checkpoints stay.
    """

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # Python's own file: its error says that the disk is full
            torch.save(state.__dict__, file)

    target = folder / f"step-{state.step:08d}"
    if target not in _all(folder):
        shutil.rmtree(target, ignore_errors=True)  # what a killed process left
    try:
        target.mkdir(parents=True, exist_ok=True)
        replace_file(target / "state.pt", write)
    except (OSError, RuntimeError) as error:  # torch.save of plain tensors raises RuntimeError for a failed write only
        with contextlib.suppress(OSError):
            target.rmdir()  # unless an earlier state is in it
        raise StorageError(
            f"checkpoint {target} could not be written: {write_failure(error)}. Earlier checkpoints are whole; free "
            "space and run the same command again to resume"
        ) from error
    for old in _all(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def _all(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step-*") if _NAME.fullmatch(p.name) and (p / "state.pt").is_file())


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def latest(folder: Path) -> State | None:
    """The newest checkpoint, or None. Raises BadCheckpointError for one that does not read."""
    found = _all(folder)
    if not found:
        return None
    path = found[-1] / "state.pt"
    try:
        return State(**torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, … for a damaged file
        raise BadCheckpointError(
            f"{path} does not read ({_line(error)}); delete its folder to resume from an earlier one"
        ) from error
