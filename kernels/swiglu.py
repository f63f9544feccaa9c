"""silu(gate) · up of one fused projection [gate | up], in one pass; with `quantize`, straight into 8-bit rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .launch import interpreting, use_triton
from .quantize import (
    EIGHT_BIT,
    LARGEST,
    Rows,
    eight_bit_types,
    empty_rows,
    quantize_rows_torch,
    row_warps,
    to_eight_bit,
)
from .spec import Spec, make_spec, pointers
from .triton_compat import tl, triton

BLOCK = 2048  # columns of a program when rows need no common scale


@triton.jit
def swiglu_kernel(
    x_ptr: tl.tensor,
    y_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    size: tl.tensor,
    BLOCK: tl.constexpr,
    LARGEST: tl.constexpr,
    INTEGER: tl.constexpr,
    EMULATE: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    keep = columns < size
    gate = tl.load(x_ptr + row * 2 * size + columns, mask=keep, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * size + size + columns, mask=keep, other=0.0).to(tl.float32)
    y = gate / (1.0 + tl.exp(-gate)) * up
    if LARGEST > 0:
        y, scale = to_eight_bit(y, keep, LARGEST, INTEGER, EMULATE)
        tl.store(scale_ptr + row, scale)
    tl.store(y_ptr + row * size + columns, y.to(y_ptr.dtype.element_ty), mask=keep)


def swiglu_torch(x: Tensor, quantize: str | None = None) -> Tensor | Rows:
    """Reference implementation of `swiglu`."""
    if quantize is None:
        gate, up = x.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up
    gate, up = x.float().chunk(2, dim=-1)
    return quantize_rows_torch(torch.nn.functional.silu(gate) * up, quantize)


def swiglu(x: Tensor, quantize: str | None = None, impl: str = "auto") -> Tensor | Rows:
    """x (…, 2I), gate first -> (…, I); `Rows` with quantize "int8" or "fp8". Raises ValueError for another."""
    if quantize is not None and quantize not in EIGHT_BIT:
        raise ValueError(f"quantize {quantize!r}: expected int8, fp8 or None")
    if not use_triton(impl, x):
        return swiglu_torch(x, quantize)
    x = x.contiguous()
    size = x.shape[-1] // 2
    shape = (*x.shape[:-1], size)
    y, scale = empty_rows(shape, quantize, x.device) if quantize else (x.new_empty(shape), x)
    block = triton.next_power_of_2(size) if quantize else min(BLOCK, triton.next_power_of_2(size))
    swiglu_kernel[x.numel() // (2 * size), triton.cdiv(size, block)](
        x, y, scale, size, BLOCK=block, LARGEST=LARGEST[quantize] if quantize else 0.0, INTEGER=quantize == "int8",
        EMULATE=interpreting(), num_warps=row_warps(block),
    )  # fmt: skip
    return Rows(y, scale) if quantize else y


def specs(sm: int, dtype: str, size: int = 8192) -> Iterator[Spec]:
    """What `kernels.aot` compiles: both stacks' gate (one kernel fits any width), and the decoder's into 8 bits."""
    for kind, y in [("", dtype), *eight_bit_types(sm)]:
        block = triton.next_power_of_2(size) if kind else BLOCK
        yield make_spec(
            f"swiglu{kind and '_'}{kind}",
            swiglu_kernel,
            pointers(swiglu_kernel, dtype, y=y, scale="fp32"),
            dict(BLOCK=block, LARGEST=LARGEST.get(kind, 0.0), INTEGER=kind == "int8", EMULATE=False),
            row_warps(block),
            1,
        )
