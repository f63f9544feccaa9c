"""Arguments of a backend for the machine at hand, checked against free memory before a weight is read."""

from __future__ import annotations

import sys
from pathlib import Path

from ..bundle.manifest import Manifest
from ..checkpoint.layout import open_checkpoint
from .bundle_fit import fit_bundle
from .fit import Fit, fit_checkpoint
from .machine import Machine, read_machine


def choose_checkpoint(
    folder: Path,
    *,
    device: str = "auto",
    dtype: str | None = None,
    precision: str | None = None,
    memory_budget: str | float | None = "auto",
    fast: bool | None = None,
    machine: Machine | None = None,
) -> Fit:
    """Arguments of the torch backend for a checkpoint on this machine, logged in one line.

    What does not go by free memory passes as it is: a size for the CPU, and the fast path off a GPU or switched off.
    machine: another one than this, for tests. Raises OutOfMemoryError, BadCheckpointError, UnsupportedDeviceError.
    """
    if device == "auto":
        device = "cuda" if _cuda(machine) else "cpu"
    on_cuda = device.partition(":")[0] == "cuda"
    auto = isinstance(memory_budget, str) and memory_budget.strip().lower() == "auto"
    kernels = on_cuda if fast is None else fast
    plain_cpu = device == "cpu" and not kernels and auto and precision is None
    if not plain_cpu and not (on_cuda and kernels):
        return Fit(device=device, dtype=dtype, precision=precision, budget=None if auto else memory_budget)
    machine = machine or read_machine(with_gpus=on_cuda)
    found = fit_checkpoint(
        open_checkpoint(folder),
        machine,
        device=device,
        dtype=dtype,
        precision=precision,
        memory_budget=memory_budget,
    )
    found.log()
    return found


def choose_bundle(
    folder: Path,
    manifest: Manifest,
    *,
    device: str,
    memory_budget: str | float | None = "auto",
    machine: Machine | None = None,
) -> Fit:
    """Which stages of a bundle stay loaded on "cpu" or "cuda:N", logged in one line. Raises OutOfMemoryError."""
    machine = machine or read_machine(with_gpus=device != "cpu")
    found = fit_bundle(manifest, machine, folder=folder, device=device, memory_budget=memory_budget)
    found.log()
    return found


def _cuda(machine: Machine | None) -> bool:
    """Whether torch, which is loaded by now, finds a CUDA device."""
    if machine is not None:
        return bool(machine.gpus)
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_available()
