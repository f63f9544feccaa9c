"""Loading for the fast path: what to keep loaded within a budget, how weights are kept, the attention to begin with."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import torch

from ...checkpoint.config import ModelConfig
from ...checkpoint.layout import open_checkpoint
from ...devices.table import RESERVE
from ...errors import UnsupportedDeviceError
from ...memory.footprint import Precision
from ...memory.layers import Workload
from ...memory.planner import LADDER, gigabytes, parse_bytes, plan
from ...memory.precision import parse_precision, split_attention
from ...model.mindomni import load_model
from ..torch.backend import DTYPES
from .backend import FastOptions, TorchCudaBackend

logger = logging.getLogger(__name__)
DEDICATED = RESERVE[False]


def load_fast(
    path: Path, device: str, dtype: str, precision: str | None = None, memory_budget: str | float | None = None
) -> TorchCudaBackend:
    """A checkpoint folder on the fast path. Weights are read on the host, quantized on the device one by one.

    memory_budget without a precision takes the most exact of `planner.LADDER` that fits, and the log says which.
    Raises BadCheckpointError, BadRequestError, OutOfMemoryError.
    """
    checkpoint = open_checkpoint(Path(path))
    precision, attention = split_attention(precision)
    chosen, resident = choose(checkpoint.config, dtype, precision, memory_budget, device)
    if device.startswith("cuda"):
        check_device(chosen, torch.cuda.get_device_capability(device))
        torch.cuda.set_device(device)  # Triton launches on the current device, whatever its tensors are on
    model, report = load_model(checkpoint, DTYPES[dtype], "cpu", vae_dtype=torch.float32)
    logger.info("%s", report)
    if memory_budget is not None and device.startswith("cuda"):
        total = torch.cuda.get_device_properties(device).total_memory
        share = (parse_bytes(memory_budget) - DEDICATED) / total
        torch.cuda.set_per_process_memory_fraction(min(max(share, 0.0), 1.0), device)
    return TorchCudaBackend(
        model, device, report, FastOptions(precision=chosen, resident=resident, attention=attention)
    )


def check_device(precision: Precision, capability: tuple[int, int]) -> None:
    """Raises UnsupportedDeviceError when a GPU lacks a type that the precision names."""
    if precision.decoder == "fp8" and capability < (8, 9):
        raise UnsupportedDeviceError(
            f"fp8 needs compute capability 8.9 (Ada) or later, this GPU has {capability[0]}.{capability[1]}; use int8"
        )
    if precision.compute == "bfloat16" and capability < (8, 0):
        raise UnsupportedDeviceError(
            f"bfloat16 needs compute capability 8.0 or later, this GPU has {capability[0]}.{capability[1]}; "
            "use dtype='float16'"
        )


def choose(
    config: ModelConfig,
    dtype: str,
    precision: str | None,
    memory_budget: str | float | None,
    device: str,
    work: Workload | None = None,
) -> tuple[Precision, tuple[str, ...] | None]:
    """(how weights are kept, parts that stay loaded or None for all). work: the largest request, 1024² unless given.

    Raises OutOfMemoryError when nothing fits.
    """
    if precision is not None:
        wanted: Precision | None = parse_precision(precision, dtype)
    else:
        wanted = None if memory_budget is not None and dtype == "bfloat16" else Precision.uniform(dtype)
        if wanted is not None and device.startswith("cuda") and dtype == "bfloat16":
            wanted = replace(wanted, vae="bfloat16")  # SDXL's VAE overflows in float16, not in bfloat16
    if memory_budget is None:
        assert wanted is not None
        return wanted, None
    budget = parse_bytes(memory_budget)
    reserve = DEDICATED if device.startswith("cuda") else 0
    work = replace(work or Workload(), joint=True)
    found = plan(config, work, precision=wanted, budget=budget, reserve=reserve)
    log = logger.info if wanted is not None or found.precision == LADDER[0] else logger.warning
    log("memory budget %s: %s", gigabytes(budget), found.summary())
    return found.precision, found.resident
