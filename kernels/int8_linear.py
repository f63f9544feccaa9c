"""Products with int8 weights and activations as they are: one row by `gemv`, many by tiles that turn int8 into 16 bits.

int8 is exact in 16 bits, so the scale of an output is applied to the sum. The weight is read once a row of tiles as
bytes and never written out.

Axes: M rows, N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .gemv import gemv, weight_only_torch
from .launch import Launch, for_sm, for_width, interpreting, sm_of, tensor_cores, use_triton
from .quantize import Rows
from .spec import Spec, make_spec, pointers
from .triton_compat import tl, triton

BLOCK_K = 64
# block_m outputs, block_n rows. None is measured yet.
LAUNCHES = {
    80: Launch(block_m=128, block_n=64, warps=8, stages=3),
    90: Launch(block_m=128, block_n=128, warps=8, stages=3),
    120: Launch(block_m=128, block_n=64, warps=8, stages=3),
}


@triton.jit
def product_kernel(
    x_ptr: tl.tensor,
    w_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    o_ptr: tl.tensor,
    m: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    BIAS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    inner = tl.arange(0, BK)
    kind = tl.float32 if UPCAST else x_ptr.dtype.element_ty
    # What is past the end reads row 0 again and is not stored: no mask inside the loop.
    x = x_ptr + tl.where(rows < m, rows, 0).to(tl.int64)[:, None] * k + inner[None, :]
    w = w_ptr + tl.where(columns < n, columns, 0).to(tl.int64)[None, :] * k + inner[:, None]
    acc = tl.zeros([BM, BN], dtype=tl.float32)
    for start in range(0, k, BK):
        if EVEN:
            a, b = tl.load(x), tl.load(w)
        else:
            a = tl.load(x, mask=inner[None, :] < k - start, other=0.0)
            b = tl.load(w, mask=inner[:, None] < k - start, other=0)
        acc = tl.dot(a.to(kind), b.to(kind), acc, input_precision="ieee")
        x += BK
        w += BK
    out = acc * tl.load(scale_ptr + columns, mask=columns < n, other=0.0)[None, :]
    if BIAS:
        out += tl.load(bias_ptr + columns, mask=columns < n, other=0.0).to(tl.float32)[None, :]
    to = o_ptr + rows.to(tl.int64)[:, None] * n + columns[None, :]
    tl.store(to, out.to(o_ptr.dtype.element_ty), mask=(rows < m)[:, None] & (columns < n)[None, :])


def int8_linear(
    x: Tensor, weight: Rows, bias: Tensor | None = None, impl: str = "auto", launch: Launch | None = None
) -> Tensor:
    """x (…, K) times an int8 weight (N, K) transposed -> (…, N). "auto" unpacks for many rows on Turing alone."""
    n, k = weight.values.shape
    m = x.numel() // k
    if m == 1:
        return gemv(x, weight, bias, impl=impl)
    if not use_triton(impl, x, tensor_cores(x.device) or interpreting(), "no tensor cores that Triton uses"):
        return weight_only_torch(x, weight, bias)
    launch = launch or for_width(for_sm(LAUNCHES, sm_of(x)), x.dtype == torch.float32)
    out = x.new_empty(*x.shape[:-1], n)
    product_kernel[triton.cdiv(n, launch.block_m), triton.cdiv(m, launch.block_n)](
        x.contiguous(), weight.values, weight.scale, x if bias is None else bias, out, m, n, k,
        BIAS=bias is not None, BM=launch.block_n, BN=launch.block_m, BK=BLOCK_K, EVEN=k % BLOCK_K == 0,
        UPCAST=interpreting() and x.dtype == torch.bfloat16, num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
    return out


def specs(sm: int, dtype: str) -> Iterator[Spec]:
    """What `kernels.aot` compiles: a prompt over the language model's weights. Nothing on Turing."""
    if sm < min(LAUNCHES):
        return
    launch = for_sm(LAUNCHES, sm)
    for bias in (False, True):
        yield make_spec(
            "int8_linear" + ("_bias" if bias else ""),
            product_kernel,
            pointers(product_kernel, dtype, w="i8", scale="fp32"),
            dict(BIAS=bias, BM=launch.block_n, BN=launch.block_m, BK=BLOCK_K, EVEN=True, UPCAST=False),
            launch.warps,
            launch.stages,
            unaligned=("m",),
        )
