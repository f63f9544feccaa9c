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
from ...memory.layers import BUDGETED, Workload
from ...memory.planner import LADDER, Plan, gigabytes, parse_bytes, plan
from ...memory.precision import parse_precision, plain_vae, split_attention
from ...model.mindomni import load_model
from ..torch.backend import DTYPES
from ..torch.device import is_cuda, limit_memory, with_index, working_on
from .backend import FastOptions, TorchCudaBackend

logger = logging.getLogger(__name__)


def load_fast(
    path: Path, device: str, dtype: str, precision: str | None = None, memory_budget: str | float | None = None
) -> TorchCudaBackend:
    """A checkpoint folder on the fast path. Weights are read on the host, quantized on the device one by one.

    memory_budget without a precision takes the most exact of `planner.LADDER` that fits, and the log says which.
    Raises BadCheckpointError, BadRequestError, OutOfMemoryError.
    """
    checkpoint, device = open_checkpoint(Path(path)), with_index(device)
    precision, attention = split_attention(precision)
    chosen, found = choose(checkpoint.config, dtype, precision, memory_budget, device)
    if is_cuda(device):
        check_device(chosen, torch.cuda.get_device_capability(device))
        limit_memory(device, 1.0 if memory_budget is None else _share(memory_budget, device))
    model, report = load_model(checkpoint, DTYPES[dtype], "cpu", vae_dtype=torch.float32)
    logger.info("%s", report)
    options = FastOptions(
        precision=chosen,
        plan=found,
        attention=attention,
        limited=memory_budget is not None and is_cuda(device),
    )
    with working_on(device):
        return TorchCudaBackend(model, device, report, options)


def reserve(device: str) -> int:
    """Bytes of a budget that are the driver's and the libraries'; none on a CPU."""
    if not is_cuda(device):
        return 0
    return RESERVE[torch.cuda.is_available() and bool(torch.cuda.get_device_properties(device).is_integrated)]


def _share(memory_budget: str | float, device: str) -> float:
    """A budget as a share of a GPU's memory, what the driver and libraries take left out."""
    return (parse_bytes(memory_budget) - reserve(device)) / torch.cuda.get_device_properties(device).total_memory


def check_device(precision: Precision, capability: tuple[int, int]) -> None:
    """Raises UnsupportedDeviceError when a GPU lacks a type that the precision names."""
    if precision.decoder in ("fp8", "fp8fast") and capability < (8, 9):
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
) -> tuple[Precision, Plan | None]:
    """(how weights are kept, the plan of a budget). work: the largest request, `BUDGETED` unless given.

    Raises OutOfMemoryError when nothing fits.
    """
    vae = plain_vae(dtype, device)
    wanted: Precision | None
    if precision is not None:
        wanted = parse_precision(precision, dtype, vae)
    else:
        wanted = None if memory_budget is not None and dtype == "bfloat16" else Precision.uniform(dtype, vae)
    if memory_budget is None:
        assert wanted is not None
        return wanted, None
    budget = parse_bytes(memory_budget)
    work = replace(work or BUDGETED, joint=True)
    found = plan(config, work, precision=wanted, budget=budget, reserve=reserve(device))
    log = logger.info if wanted is not None or found.precision == LADDER[0] else logger.warning
    log("memory budget %s: %s", gigabytes(budget), found.summary())
    return found.precision, found
