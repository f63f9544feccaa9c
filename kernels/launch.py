"""What the kernels share: launch shapes per GPU generation, choice of implementation, splitting a head in two.

SM numbers are compute capabilities without the dot: 75 Turing, 80 and 86 Ampere, 87 Orin, 89 Ada, 90 Hopper,
100 Blackwell (data centre), 110 Thor, 120 and 121 Blackwell (RTX, DGX Spark).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

from .triton_compat import HAS_TRITON, triton

SMS = (75, 80, 86, 87, 89, 90, 100, 110, 120, 121)

# Largest shared memory of one block in bytes (CUDA programming guide, table of compute capabilities).
SHARED_LIMIT = {
    75: 64 << 10,
    80: 163 << 10,
    86: 99 << 10,
    87: 163 << 10,
    89: 99 << 10,
    90: 227 << 10,
    100: 227 << 10,
    110: 227 << 10,
    120: 99 << 10,
    121: 99 << 10,
}

TENSOR_CORES = 80
"""The first SM whose tensor cores Triton 3.9 uses: on Turing a product becomes multiply-adds (seen in the PTX)."""

IMPLEMENTATIONS = ("auto", "triton", "torch")


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Tile of one program: block_m rows of queries (or outputs), block_n of keys (or inputs)."""

    block_m: int
    block_n: int
    warps: int
    stages: int


T = TypeVar("T")


def for_sm(table: Mapping[int, T], sm: int) -> T:
    """The row of the newest generation that is not newer than sm; the oldest row for anything older.

    sm 0 (the interpreter) therefore takes the oldest row too.
    """
    known = [key for key in sorted(table) if key <= sm]
    return table[known[-1] if known else min(table)]


def for_width(launch: Launch, wide: bool) -> Launch:
    """The launch for 32-bit numbers (tests, not speed): tables are made for 16 bits, whose tiles are half as large."""
    if not wide:
        return launch
    return replace(launch, block_n=max(launch.block_n // 2, 16), stages=min(launch.stages, 2))


@lru_cache(maxsize=16)
def device_sm(index: int) -> int:
    """Compute capability of a CUDA device, as 89 for 8.9."""
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def sm_of(tensor: Tensor) -> int:
    """The SM that a tensor lives on; 0 for the CPU (the interpreter)."""
    return device_sm(tensor.device.index or 0) if tensor.is_cuda else 0


def tensor_cores(device: torch.device) -> bool:
    """Whether Triton's products reach the tensor cores of a device."""
    return device.type == "cuda" and device_sm(device.index or 0) >= TENSOR_CORES


def interpreting() -> bool:
    """True when kernels run under Triton's interpreter (TRITON_INTERPRET=1), on CPU tensors."""
    return HAS_TRITON and bool(triton.knobs.runtime.interpret)


def use_triton(impl: str, tensor: Tensor, supported: bool = True, need: str = "") -> bool:
    """Resolves `impl`. "auto" is Triton on CUDA where the shape is supported, else the reference implementation.

    Raises ValueError for an unknown name, or when "triton" is forced where it cannot run.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl {impl!r}: expected one of {', '.join(IMPLEMENTATIONS)}")
    if impl == "torch" or (impl == "auto" and not (HAS_TRITON and tensor.is_cuda and supported)):
        return False
    if not HAS_TRITON:
        raise ValueError("impl='triton': triton is not installed; use impl='torch' or install it")
    if not tensor.is_cuda and not interpreting():
        raise ValueError("impl='triton' needs a CUDA tensor, or TRITON_INTERPRET=1 set before the kernels are imported")
    if not supported:
        raise ValueError(f"impl='triton': {need}")
    return True


def split_head(head_dim: int) -> tuple[int, int]:
    """A head as two powers of two, so that 96 costs 64 + 32 and not a padded 128. (0, 0) where it does not split.

    Triton's tiles are powers of two and its matrix product needs at least 16 columns.
    """
    first = 1 << max((head_dim - 1).bit_length() - 1, 0)  # the largest power of two below head_dim
    second = head_dim - first
    if second < 16 or second & (second - 1):
        return 0, 0
    return first, second


def upcast(tensor: Tensor) -> bool:
    """The interpreter computes bfloat16 wrongly (on its raw bits), so kernels widen it first there, and only there."""
    return interpreting() and tensor.dtype == torch.bfloat16
