"""Rows as 8-bit numbers with one scale each: int8 (symmetric, ±127) and fp8 (e4m3, ±448).

The norm and the gate of a block end in it (`norms`, `swiglu`), so that no 16-bit copy of their output is written; the
attention's output goes through `quantize_rows`. Products with such rows are in `linear8`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .launch import interpreting, use_triton
from .spec import Spec, make_spec, pointers
from .triton_compat import tl, triton

EIGHT_BIT = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
LARGEST = {"int8": 127.0, "fp8": 448.0}
LEAST_SCALE = 1e-12  # of a row of zeros


@dataclass(frozen=True)
class Rows:
    """values (…, C) of int8 or float8 and scale (…, 1) float32: value · scale is the number meant."""

    values: Tensor
    scale: Tensor

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Back to floats."""
        return (self.values.float() * self.scale).to(dtype)


@triton.jit
def round_e4m3(x: tl.tensor) -> tl.tensor:
    """float32 within ±448 -> the nearest number of e4m3, still float32.

    For the interpreter alone, whose own cast drops the carry (127.9 becomes 64, not 128); a GPU's cast rounds.
    """
    bits = x.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -1048576).to(tl.float32, bitcast=True)
    tiny = (x + 24576.0) - 24576.0  # below 2⁻⁶ numbers lie 2⁻⁹ apart
    return tl.where(tl.abs(x) < 0.015625, tiny, normal)


@triton.jit
def to_eight_bit(
    x: tl.tensor, keep: tl.tensor, LARGEST: tl.constexpr, INTEGER: tl.constexpr, EMULATE: tl.constexpr
) -> tuple:
    """A row x (BLOCK,) float32 -> (values in range, still float32; its scale). Integers round half to even."""
    scale = tl.maximum(tl.max(tl.where(keep, tl.abs(x), 0.0), 0) / LARGEST, 1e-12)
    y = x / scale
    if INTEGER:
        # Adding and taking away 1.5 · 2²³ rounds to the nearest whole number: no library call on any SM.
        y = (y + 12582912.0) - 12582912.0
    y = tl.minimum(tl.maximum(y, -LARGEST), LARGEST)
    if EMULATE and not INTEGER:
        y = round_e4m3(y)
    return y, scale


@triton.jit
def rows_kernel(
    x_ptr: tl.tensor,
    y_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    size: tl.tensor,
    stride: tl.tensor,
    BLOCK: tl.constexpr,
    LARGEST: tl.constexpr,
    INTEGER: tl.constexpr,
    EMULATE: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    keep = columns < size
    x = tl.load(x_ptr + row * stride + columns, mask=keep, other=0.0).to(tl.float32)
    y, scale = to_eight_bit(x, keep, LARGEST, INTEGER, EMULATE)
    tl.store(y_ptr + row * size + columns, y.to(y_ptr.dtype.element_ty), mask=keep)
    tl.store(scale_ptr + row, scale)


def quantize_rows_torch(x: Tensor, kind: str) -> Rows:
    """Reference implementation of `quantize_rows`."""
    largest = LARGEST[kind]
    wide = x.float()
    scale = (wide.abs().amax(-1, keepdim=True) / largest).clamp_min(LEAST_SCALE)
    y = wide / scale
    if kind == "int8":
        y = y.round()
    return Rows(y.clamp(-largest, largest).to(EIGHT_BIT[kind]), scale)


def quantize_rows(x: Tensor, kind: str, impl: str = "auto") -> Rows:
    """x (…, C) float -> 8-bit rows. kind: "int8" or "fp8". Raises ValueError for another."""
    if kind not in EIGHT_BIT:
        raise ValueError(f"kind {kind!r}: expected int8 or fp8")
    if not use_triton(impl, x):
        return quantize_rows_torch(x, kind)
    flat = x.reshape(-1, x.shape[-1])
    rows, size = flat.shape
    y, scale = empty_rows(x.shape, kind, x.device)
    block = triton.next_power_of_2(size)
    rows_kernel[(rows,)](
        flat, y, scale, size, flat.stride(0),
        BLOCK=block, LARGEST=LARGEST[kind], INTEGER=kind == "int8", EMULATE=interpreting(),
        num_warps=row_warps(block),
    )  # fmt: skip
    return Rows(y, scale)


def empty_rows(shape: torch.Size | tuple[int, ...], kind: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Room for 8-bit rows of a shape: values and scales."""
    return (
        torch.empty(shape, dtype=EIGHT_BIT[kind], device=device),
        torch.empty((*shape[:-1], 1), dtype=torch.float32, device=device),
    )


def row_warps(block: int) -> int:
    """Warps for one program that holds a whole row: about 16 numbers a thread."""
    return min(max(block // 512, 1), 16)


def eight_bit_types(sm: int) -> Iterator[tuple[str, str]]:
    """(kind, Triton type) that an SM has products for: fp8 came with Ada."""
    yield "int8", "i8"
    if sm >= 89:
        yield "fp8", "fp8e4nv"


def specs(sm: int, dtype: str, size: int = 3072) -> Iterator[Spec]:
    """What `kernels.aot` compiles: the attention's output."""
    block = triton.next_power_of_2(size)
    for kind, y in eight_bit_types(sm):
        yield make_spec(
            f"quantize_rows_{kind}",
            rows_kernel,
            pointers(rows_kernel, dtype, y=y, scale="fp32"),
            dict(BLOCK=block, LARGEST=LARGEST[kind], INTEGER=kind == "int8", EMULATE=False),
            row_warps(block),
            1,
        )
