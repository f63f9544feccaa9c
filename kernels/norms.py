"""RMSNorm with the residual added first, in one pass over the row: y = norm(x + residual) · weight, and x + residual.

A block reads its input once for both uses of it. With `quantize` the normed row leaves as 8-bit numbers and a scale.
"""

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


@triton.jit
def norm_kernel(
    x_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    y_ptr: tl.tensor,
    sum_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    eps: tl.tensor,
    size: tl.tensor,
    BLOCK: tl.constexpr,
    RESIDUAL: tl.constexpr,
    LARGEST: tl.constexpr,
    INTEGER: tl.constexpr,
    EMULATE: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * size
    columns = tl.arange(0, BLOCK)
    keep = columns < size
    x = tl.load(x_ptr + row + columns, mask=keep, other=0.0).to(tl.float32)
    if RESIDUAL:
        x += tl.load(residual_ptr + row + columns, mask=keep, other=0.0).to(tl.float32)
        rounded = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row + columns, rounded, mask=keep)
        x = rounded.to(tl.float32)  # the norm is of what is stored, as in the unfused block
    weight = tl.load(weight_ptr + columns, mask=keep, other=0.0).to(tl.float32)
    y = x * (1.0 / tl.sqrt(tl.sum(x * x, 0) / size + eps)) * weight
    if LARGEST > 0:
        y, scale = to_eight_bit(y, keep, LARGEST, INTEGER, EMULATE)
        tl.store(scale_ptr + tl.program_id(0), scale)
    tl.store(y_ptr + row + columns, y.to(y_ptr.dtype.element_ty), mask=keep)


def add_norm_torch(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, quantize: str | None = None
) -> tuple[Tensor | Rows, Tensor]:
    """Reference implementation of `add_norm`."""
    total = x if residual is None else x + residual
    if quantize is None:
        return torch.nn.functional.rms_norm(total, (total.shape[-1],), weight, eps), total
    y = torch.nn.functional.rms_norm(total.float(), (total.shape[-1],), weight.float(), eps)
    return quantize_rows_torch(y, quantize), total


def add_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None = None,
    quantize: str | None = None,
    impl: str = "auto",
) -> tuple[Tensor | Rows, Tensor]:
    """(norm(x + residual) · weight, x + residual) over the last axis; x (…, C), residual the same or None.

    quantize "int8" or "fp8" gives the first as `Rows`. Without a residual the second is x itself.
    Raises ValueError for another `quantize`.
    """
    if quantize is not None and quantize not in EIGHT_BIT:
        raise ValueError(f"quantize {quantize!r}: expected int8, fp8 or None")
    if not use_triton(impl, x):
        return add_norm_torch(x, weight, eps, residual, quantize)
    x = x.contiguous()
    size = x.shape[-1]
    total = x if residual is None else torch.empty_like(x)
    y, scale = empty_rows(x.shape, quantize, x.device) if quantize else (torch.empty_like(x), x)
    block = triton.next_power_of_2(size)
    norm_kernel[(x.numel() // size,)](
        x, x if residual is None else residual.contiguous(), weight, y, total, scale, eps, size,
        BLOCK=block, RESIDUAL=residual is not None, LARGEST=LARGEST[quantize] if quantize else 0.0,
        INTEGER=quantize == "int8", EMULATE=interpreting(), num_warps=row_warps(block),
    )  # fmt: skip
    return (Rows(y, scale) if quantize else y), total


def specs(sm: int, dtype: str, sizes: tuple[int, ...] = (3072, 3584)) -> Iterator[Spec]:
    """What `kernels.aot` compiles: both stacks' norms with a residual, and the decoder's into 8 bits."""
    for size in sizes:
        block = triton.next_power_of_2(size)
        for kind, y in [("", dtype), *eight_bit_types(sm)]:
            yield make_spec(
                f"add_norm_{size}{kind and '_'}{kind}",
                norm_kernel,
                {**pointers(norm_kernel, dtype, y=y, scale="fp32"), "eps": "fp32"},
                dict(BLOCK=block, RESIDUAL=True, LARGEST=LARGEST.get(kind, 0.0), INTEGER=kind == "int8", EMULATE=False),
                row_warps(block),
                1,
            )
