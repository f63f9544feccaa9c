"""One row of x times a 16-bit or int8 weight: reading the weight once, at the memory's speed, is all that decoding is.

int8 is weight-only: x stays as it is, each output has a scale.

BN outputs a program, BK inputs in flight. Axes: N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .dependent import AHEAD, begin, dependent, launch_options, prefetch
from .launch import Launch, for_sm, sm_of, use_triton
from .parts import by_parts, unpacked_rows
from .quantize import Rows
from .spec import Spec, make_spec, pointers
from .triton_compat import tl, triton

# block_m outputs, block_n inputs. None is measured yet.
LAUNCHES = {
    75: Launch(block_m=4, block_n=512, warps=4, stages=1),
    80: Launch(block_m=4, block_n=1024, warps=4, stages=3),
    90: Launch(block_m=4, block_n=1024, warps=4, stages=4),
    120: Launch(block_m=4, block_n=1024, warps=4, stages=3),
}


@triton.jit
def gemv_kernel(
    x_ptr: tl.tensor,
    w_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    o_ptr: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    BIAS: tl.constexpr,
    SCALED: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = columns < n
    row = tl.where(inside, columns, 0).to(tl.int64)
    inner = tl.arange(0, BK)
    if PDL:
        ahead = tl.minimum(tl.arange(0, AHEAD * BK // 64) * 64, k - 1)
        prefetch(w_ptr + row[:, None] * k + ahead[None, :])
    begin(PDL)
    acc = tl.zeros([BN, BK], dtype=tl.float32)
    for start in tl.range(0, k, BK, num_stages=STAGES):
        keep = start + inner < k
        x = tl.load(x_ptr + start + inner, mask=keep, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + row[:, None] * k + start + inner[None, :], mask=keep[None, :], other=0.0)
        acc += w.to(tl.float32) * x[None, :]
    out = tl.sum(acc, 1)
    if SCALED:
        out *= tl.load(scale_ptr + columns, mask=inside, other=0.0)
    if BIAS:
        out += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(o_ptr + columns, out.to(o_ptr.dtype.element_ty), mask=inside)


def weight_only_torch(x: Tensor, weight: Rows, bias: Tensor | None = None) -> Tensor:
    """Reference implementation of `gemv` on an int8 weight, unpacked some outputs at a time to bound the copy."""
    n, k = weight.values.shape
    # Twice in float32 while it is scaled.
    rows, tensors = unpacked_rows(k, 8), (weight.values, weight.scale)
    return by_parts(x, n, rows, tensors, lambda *p: Rows(*p).dequantize(x.dtype), bias)


def gemv(
    x: Tensor, weight: Tensor | Rows, bias: Tensor | None = None, impl: str = "auto", launch: Launch | None = None
) -> Tensor:
    """x (…, K) of one row times weight (N, K) transposed -> (…, N). More rows take the plain way.

    weight: floats, or int8 `Rows` with a scale an output. Raises ValueError when Triton is forced on more rows.
    """
    scaled = isinstance(weight, Rows)
    values = weight.values if isinstance(weight, Rows) else weight
    n, k = values.shape
    if not use_triton(impl, x, x.numel() == k, f"{x.numel() // k} rows; gemv takes one"):
        if isinstance(weight, Rows):
            return weight_only_torch(x, weight, bias)
        return torch.nn.functional.linear(x, weight, bias)
    launch = launch or for_sm(LAUNCHES, sm_of(x))
    pdl = dependent(sm_of(x))
    out = x.new_empty(*x.shape[:-1], n)
    gemv_kernel[(triton.cdiv(n, launch.block_m),)](
        x.contiguous(), values, weight.scale if isinstance(weight, Rows) else x, x if bias is None else bias, out, n, k,
        BIAS=bias is not None, SCALED=scaled, BN=launch.block_m, BK=launch.block_n,
        STAGES=launch.stages, PDL=pdl, num_warps=launch.warps, num_stages=launch.stages, **launch_options(pdl),
    )  # fmt: skip
    return out


def specs(sm: int, dtype: str) -> Iterator[Spec]:
    """What `kernels.aot` compiles."""
    launch = for_sm(LAUNCHES, sm)
    for bias in (False, True):
        for weight in (dtype, "i8"):
            yield make_spec(
                "gemv" + ("_int8" if weight == "i8" else "") + ("_bias" if bias else ""),
                gemv_kernel,
                pointers(gemv_kernel, dtype, w=weight, scale="fp32"),
                dict(
                    BIAS=bias,
                    SCALED=weight == "i8",
                    BN=launch.block_m,
                    BK=launch.block_n,
                    STAGES=launch.stages,
                    PDL=dependent(sm),
                ),
                launch.warps,
                launch.stages,
            )
