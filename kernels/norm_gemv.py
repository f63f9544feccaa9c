"""RMSNorm, one row's product and the gate in one kernel: decoding with three launches a block fewer.

    y = W (g · t) / rms(t),   t = x + residual
Every program reads the row anyway, so it sums t² beside the product and divides at the end: the norm costs no pass. The
first program stores t. With `gate` the weight is [gate | up] and the result silu(gate) · up.

N outputs (half of the weight's rows with `gate`), K inputs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .dependent import AHEAD, begin, dependent, launch_options, prefetch
from .gemv import gemv
from .launch import Launch, for_sm, sm_of, use_triton
from .norms import add_norm_torch
from .quantize import Rows
from .spec import Spec, make_spec, pointers
from .swiglu import swiglu_torch
from .triton_compat import tl, triton

# block_m outputs, block_n inputs; with the gate twice as many weights are in flight. None is measured yet.
LAUNCHES = {
    75: Launch(block_m=2, block_n=512, warps=4, stages=1),
    80: Launch(block_m=4, block_n=512, warps=4, stages=3),
    90: Launch(block_m=4, block_n=512, warps=4, stages=4),
    120: Launch(block_m=4, block_n=512, warps=4, stages=3),
}


@triton.jit
def norm_gemv_kernel(
    x_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    norm_ptr: tl.tensor,
    w_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    o_ptr: tl.tensor,
    sum_ptr: tl.tensor,
    eps: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    BIAS: tl.constexpr,
    SCALED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    GATE: tl.constexpr,
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
        if GATE:
            prefetch(w_ptr + (row + n)[:, None] * k + ahead[None, :])
    begin(PDL)
    acc = tl.zeros([BN, BK], dtype=tl.float32)
    up = tl.zeros([BN, BK], dtype=tl.float32)
    squares = tl.zeros([BK], dtype=tl.float32)
    for start in tl.range(0, k, BK, num_stages=STAGES):
        keep = start + inner < k
        t = tl.load(x_ptr + start + inner, mask=keep, other=0.0).to(tl.float32)
        if RESIDUAL:
            t += tl.load(residual_ptr + start + inner, mask=keep, other=0.0).to(tl.float32)
            stored = t.to(sum_ptr.dtype.element_ty)
            if tl.program_id(0) == 0:
                tl.store(sum_ptr + start + inner, stored, mask=keep)
            t = stored.to(tl.float32)
        squares += t * t
        t = t * tl.load(norm_ptr + start + inner, mask=keep, other=0.0).to(tl.float32)
        at = w_ptr + row[:, None] * k + start + inner[None, :]
        acc += tl.load(at, mask=keep[None, :], other=0.0).to(tl.float32) * t[None, :]
        if GATE:
            up += tl.load(at + n.to(tl.int64) * k, mask=keep[None, :], other=0.0).to(tl.float32) * t[None, :]
    rms = 1.0 / tl.sqrt(tl.sum(squares, 0) / k + eps)
    out = tl.sum(acc, 1) * rms
    if SCALED:
        out *= tl.load(scale_ptr + columns, mask=inside, other=0.0)
    if BIAS:
        out += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if GATE:
        high = tl.sum(up, 1) * rms
        if SCALED:
            high *= tl.load(scale_ptr + n + columns, mask=inside, other=0.0)
        out = out / (1.0 + tl.exp(-out)) * high
    tl.store(o_ptr + columns, out.to(o_ptr.dtype.element_ty), mask=inside)


def norm_gemv_torch(
    x: Tensor,
    weight: Tensor | Rows,
    norm: Tensor,
    eps: float,
    residual: Tensor | None = None,
    bias: Tensor | None = None,
    gate: bool = False,
) -> tuple[Tensor, Tensor]:
    """Reference implementation of `norm_gemv`: one after the other."""
    normed, total = add_norm_torch(x, norm, eps, residual)
    assert isinstance(normed, Tensor)
    out = gemv(normed, weight, bias, impl="torch")
    if gate:
        gated = swiglu_torch(out)
        assert isinstance(gated, Tensor)
        return gated, total
    return out, total


def norm_gemv(
    x: Tensor,
    weight: Tensor | Rows,
    norm: Tensor,
    eps: float,
    residual: Tensor | None = None,
    bias: Tensor | None = None,
    gate: bool = False,
    impl: str = "auto",
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor]:
    """(product of norm(x + residual), x + residual) for x (…, K) of one row; residual the same or None.

    weight (N, K), floats or int8 `Rows`; with gate (2N, K) and the result silu(first half) · second half.
    Raises ValueError when Triton is forced on more rows, or for a bias with the gate.
    """
    if gate and bias is not None:
        raise ValueError("a gated product has no bias")
    values = weight.values if isinstance(weight, Rows) else weight
    k = values.shape[1]
    n = values.shape[0] // 2 if gate else values.shape[0]
    if not use_triton(impl, x, x.numel() == k, f"{x.numel() // k} rows; norm_gemv takes one"):
        return norm_gemv_torch(x, weight, norm, eps, residual, bias, gate)
    launch = launch or for_sm(LAUNCHES, sm_of(x))
    x, pdl = x.contiguous(), dependent(sm_of(x))
    out = x.new_empty(*x.shape[:-1], n)
    total = x if residual is None else torch.empty_like(x)
    norm_gemv_kernel[(triton.cdiv(n, launch.block_m),)](
        x, x if residual is None else residual.contiguous(), norm, values,
        weight.scale if isinstance(weight, Rows) else x, x if bias is None else bias, out, total, eps, n, k,
        BIAS=bias is not None, SCALED=isinstance(weight, Rows), RESIDUAL=residual is not None, GATE=gate,
        BN=launch.block_m, BK=launch.block_n, STAGES=launch.stages, PDL=pdl,
        num_warps=launch.warps, num_stages=launch.stages, **launch_options(pdl),
    )  # fmt: skip
    return out, total


def specs(sm: int, dtype: str) -> Iterator[Spec]:
    """What `kernels.aot` compiles: the language model's q, k, v (with a bias) and its gate."""
    launch = for_sm(LAUNCHES, sm)
    for gate in (False, True):
        for weight in (dtype, "i8"):
            yield make_spec(
                "norm_gemv" + ("_int8" if weight == "i8" else "") + ("_gate" if gate else ""),
                norm_gemv_kernel,
                {**pointers(norm_gemv_kernel, dtype, w=weight, scale="fp32"), "eps": "fp32"},
                dict(
                    BIAS=not gate,
                    SCALED=weight == "i8",
                    RESIDUAL=True,
                    GATE=gate,
                    BN=launch.block_m,
                    BK=launch.block_n,
                    STAGES=launch.stages,
                    PDL=dependent(sm),
                ),
                launch.warps,
                launch.stages,
            )
