"""Matrix products of 8-bit rows: (a · scale_a) (w · scale_w)ᵀ with one scale a token and one a channel.

int8 accumulates exactly in int32; fp8 in float32. Ada's and Hopper's tensor cores keep 13 bits of an fp8 sum's
fraction, so there a sum leaves them every BLOCK_K products and goes on in float32, unless `fast` is asked for. Left to
itself Triton never does that. The scales and the bias are applied while the result is in registers,
which torch._int_mm cannot do (it writes int32, twice the bytes of the bfloat16 wanted). cuBLAS' products are
a third implementation: torch._scaled_mm (fp8, Ada and later) and torch._int_mm, the only one on Turing (Triton has no
int8 product there).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from .launch import TENSOR_CORES, Launch, for_sm, sm_of, tensor_cores, use_triton
from .quantize import LARGEST, Rows, eight_bit_types, quantize_rows_torch
from .spec import Spec, make_spec, pointers
from .triton_compat import tl, triton

BLOCK_K = 128
CUBLAS_ROWS = 1024  # that torch._int_mm writes as int32 at once: twice to four times the bytes of the result
GROUP = 8  # row blocks that share a column block before moving on, for the L2
LAUNCHES = {
    80: Launch(block_m=128, block_n=128, warps=8, stages=3),
    90: Launch(block_m=128, block_n=256, warps=8, stages=4),
    120: Launch(block_m=128, block_n=128, warps=8, stages=3),
}
SHORT_SUMS = {75: False, 89: True, 100: False}
"""Whether the tensor cores sum fp8 products in fewer bits than float32's."""
PROMOTED_N = 128  # columns of a tile at most where sums are held twice: 256 on Hopper spill registers


@triton.jit
def linear8_kernel(
    a_ptr: tl.tensor,
    w_ptr: tl.tensor,
    scale_a_ptr: tl.tensor,
    scale_w_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    o_ptr: tl.tensor,
    m: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    BIAS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    INTEGER: tl.constexpr,
    PROMOTE: tl.constexpr,
    EVEN: tl.constexpr,
) -> None:
    rows_of, columns_of = tl.cdiv(m, BM), tl.cdiv(n, BN)
    index = tl.program_id(0)
    band = index // (GROUP * columns_of)
    height = tl.minimum(rows_of - band * GROUP, GROUP)
    block_m = band * GROUP + (index % (GROUP * columns_of)) % height
    block_n = (index % (GROUP * columns_of)) // height
    rows = block_m * BM + tl.arange(0, BM)
    columns = block_n * BN + tl.arange(0, BN)
    inner = tl.arange(0, BK)
    # Rows past the end read row 0 again and are not stored: no mask inside the loop.
    a = a_ptr + tl.where(rows < m, rows, 0).to(tl.int64)[:, None] * k + inner[None, :]
    w = w_ptr + tl.where(columns < n, columns, 0).to(tl.int64)[None, :] * k + inner[:, None]
    acc = tl.zeros([BM, BN], dtype=tl.int32 if INTEGER else tl.float32)
    for start in range(0, k, BK):
        if EVEN:
            x, y = tl.load(a), tl.load(w)
        else:
            x = tl.load(a, mask=inner[None, :] < k - start, other=0.0)
            y = tl.load(w, mask=inner[:, None] < k - start, other=0.0)
        if PROMOTE:
            # With a limit, the compiler does not fold the addition into the product.
            acc += tl.dot(x, y, max_num_imprecise_acc=BK)
        else:
            acc = tl.dot(x, y, acc, out_dtype=tl.int32 if INTEGER else tl.float32)
        a += BK
        w += BK
    scale_a = tl.load(scale_a_ptr + rows, mask=rows < m, other=0.0)
    scale_w = tl.load(scale_w_ptr + columns, mask=columns < n, other=0.0)
    out = acc.to(tl.float32) * scale_a[:, None] * scale_w[None, :]
    if BIAS:
        out += tl.load(bias_ptr + columns, mask=columns < n, other=0.0).to(tl.float32)[None, :]
    to = o_ptr + rows.to(tl.int64)[:, None] * n + columns[None, :]
    tl.store(to, out.to(o_ptr.dtype.element_ty), mask=(rows < m)[:, None] & (columns < n)[None, :])


def quantize_weight(weight: Tensor, kind: str) -> Rows:
    """A weight (N, K) with one scale a channel (row)."""
    parts = [quantize_rows_torch(part, kind) for part in weight.split(4096)]
    return Rows(torch.cat([p.values for p in parts]), torch.cat([p.scale for p in parts]))


def linear8_torch(a: Rows, weight: Rows, dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
    """Reference implementation of `linear8`: sums in float64 (exact for int8), then the scales."""
    out = (a.values.double() @ weight.values.double().T).float() * a.scale * weight.scale[:, 0]
    return (out if bias is None else out + bias.float()).to(dtype)


def linear8_cublas(a: Rows, weight: Rows, dtype: torch.dtype, bias: Tensor | None = None, fast: bool = False) -> Tensor:
    """The same by torch._int_mm or torch._scaled_mm, on CUDA cuBLASLt's. K and N must be multiples of 16.

    fast: as `linear8`.
    """
    flat = a.values.reshape(-1, a.values.shape[-1])
    scale, channels = a.scale.reshape(-1, 1), weight.scale.reshape(1, -1)
    if flat.dtype == torch.int8:
        out = torch.empty(flat.shape[0], weight.values.shape[0], dtype=dtype, device=flat.device)
        for rows, scales, place in zip(*(t.split(CUBLAS_ROWS) for t in (flat, scale, out)), strict=True):
            _int8_cublas(rows, scales, weight.values, channels, bias, place)
    else:
        out = torch._scaled_mm(
            flat, weight.values.T, scale_a=scale, scale_b=channels, bias=bias, out_dtype=dtype, use_fast_accum=fast
        )
    return out.unflatten(0, a.values.shape[:-1])


def _int8_cublas(
    rows: Tensor, scale: Tensor, weight: Tensor, channels: Tensor, bias: Tensor | None, out: Tensor
) -> None:
    short = max(17 - rows.shape[0], 0)  # _int_mm on CUDA wants more than 16 rows
    sums = torch._int_mm(F.pad(rows, (0, 0, 0, short)) if short else rows, weight.T)[: rows.shape[0]]
    wide = (sums * scale).mul_(channels)
    out.copy_(wide if bias is None else wide.add_(bias.float()))


def linear8(
    a: Rows,
    weight: Rows,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    impl: str = "auto",
    launch: Launch | None = None,
    fast: bool = False,
) -> Tensor:
    """a (…, K) times weight (N, K) transposed, both `Rows` of one type -> (…, N) of dtype.

    impl: "triton", "torch" (the reference), "cublas", or "auto": on CUDA cuBLAS for fp8 to bfloat16 and int8 on
    Turing, else Triton; the reference elsewhere. fast: fp8 sums stay in the tensor cores to the end, faster and less
    exact on Ada and Hopper, the same elsewhere. Raises ValueError for shapes or types that do not fit.
    """
    if a.values.dtype != weight.values.dtype or a.values.shape[-1] != weight.values.shape[1]:
        raise ValueError(
            f"rows {a.values.dtype} {tuple(a.values.shape)} do not fit a weight "
            f"{weight.values.dtype} {tuple(weight.values.shape)}"
        )
    integer = a.values.dtype == torch.int8
    device = a.values.device
    # With a scale a row cuBLAS' fp8 product gives bfloat16 alone (all but some builds, on Hopper).
    ours = tensor_cores(device) if integer else dtype != torch.bfloat16
    if impl == "cublas" or (impl == "auto" and a.values.is_cuda and not ours):
        return linear8_cublas(a, weight, dtype, bias, fast)
    if not use_triton(impl, a.values):
        return linear8_torch(a, weight, dtype, bias)
    sm = sm_of(a.values)
    promote = promotes(sm, integer, fast)
    launch = launch or launch_of(sm, promote)
    n, k = weight.values.shape
    m = a.values.numel() // k
    out = torch.empty((*a.values.shape[:-1], n), dtype=dtype, device=a.values.device)
    grid = (triton.cdiv(m, launch.block_m) * triton.cdiv(n, launch.block_n),)
    linear8_kernel[grid](
        a.values.contiguous(), weight.values, a.scale, weight.scale, weight.scale if bias is None else bias, out,
        m, n, k,
        BIAS=bias is not None, BM=launch.block_m, BN=launch.block_n, BK=BLOCK_K, GROUP=GROUP, INTEGER=integer,
        PROMOTE=promote, EVEN=k % BLOCK_K == 0, num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
    return out


def promotes(sm: int, integer: bool, fast: bool) -> bool:
    """Whether the kernel takes sums out of the tensor cores on the way."""
    return not integer and not fast and for_sm(SHORT_SUMS, sm)


def launch_of(sm: int, promote: bool) -> Launch:
    """The tile of the table, narrower where sums are held twice."""
    launch = for_sm(LAUNCHES, sm)
    return replace(launch, block_n=min(launch.block_n, PROMOTED_N)) if promote else launch


def specs(sm: int, dtype: str) -> Iterator[Spec]:
    """What `kernels.aot` compiles: one kernel serves all four products of a block. Nothing on Turing."""
    if sm < TENSOR_CORES:
        return
    for (kind, element), fast in product(eight_bit_types(sm), (False, True)):
        assert kind in LARGEST
        promote = promotes(sm, kind == "int8", fast)
        if fast and not promotes(sm, kind == "int8", False):
            continue
        launch = launch_of(sm, promote)
        yield make_spec(
            f"linear8_{kind}" + "_fast" * fast,
            linear8_kernel,
            pointers(linear8_kernel, dtype, a=element, w=element, scale_a="fp32", scale_w="fp32"),
            dict(
                BIAS=False, BM=launch.block_m, BN=launch.block_n, BK=BLOCK_K, GROUP=GROUP, INTEGER=kind == "int8",
                PROMOTE=promote, EVEN=True,
            ),
            launch.warps,
            launch.stages,
            unaligned=("m",),
        )  # fmt: skip
