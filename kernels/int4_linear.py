"""Products with 4-bit weights for decoding: weights stay packed, activations stay as they are.

A group of G inputs of one output shares a scale and a minimum: weight = q · scale + minimum, q in 0…15. Then
    y[n] = Σ_groups scale · (Σ q x) + minimum · (Σ x)
so the weights are never written out. Byte j of a group holds q of input j (low) and of input j + G/2 (high): both
halves of x are read in order. One row of x is a plain sum, a few rows are matrix products on the tensor cores.

Axes: M rows, N outputs, K inputs, G group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .dependent import AHEAD, begin, dependent, launch_options, prefetch
from .launch import Launch, for_sm, interpreting, sm_of, tensor_cores, use_triton
from .parts import by_parts, unpacked_rows
from .spec import Spec, make_spec, pointers
from .triton_compat import tl, triton

# block_m: outputs of a program; block_n: groups read at once (GEMV), rows of x (product). None is measured yet.
GEMV = {
    75: Launch(block_m=8, block_n=8, warps=4, stages=1),
    80: Launch(block_m=8, block_n=8, warps=4, stages=3),
    90: Launch(block_m=8, block_n=8, warps=4, stages=4),
    120: Launch(block_m=8, block_n=8, warps=4, stages=3),
}
PRODUCT = {
    75: Launch(block_m=32, block_n=16, warps=4, stages=2),
    80: Launch(block_m=64, block_n=16, warps=4, stages=3),
    90: Launch(block_m=64, block_n=16, warps=4, stages=4),
    120: Launch(block_m=64, block_n=16, warps=4, stages=3),
}
WIDE = {80: Launch(block_m=128, block_n=64, warps=8, stages=3)}  # 128 x 128 spills on Hopper and Thor
FEW_ROWS = 64  # with more, tiles are as large as those of an ordinary product
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8)


@dataclass(frozen=True)
class Int4Weight:
    """packed uint8 (N, K/2); scale and minimum (N, K/G) of the compute type."""

    packed: Tensor
    scale: Tensor
    minimum: Tensor

    @property
    def group(self) -> int:
        return 2 * self.packed.shape[1] // self.scale.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        return self.packed.shape[0], 2 * self.packed.shape[1]

    def dequantize(self) -> Tensor:
        """The weight (N, K) that is meant, in the type of the scales."""
        half = self.group // 2
        low_high = self.packed.unflatten(1, (-1, half))
        q = torch.cat([low_high & 15, low_high >> 4], dim=-1).to(self.scale.dtype)
        return q.mul_(self.scale.unsqueeze(-1)).add_(self.minimum.unsqueeze(-1)).flatten(1)


def quantize_int4(weight: Tensor, group: int = 128, clips: tuple[float, ...] = CLIPS) -> Int4Weight:
    """Packs a weight (N, K). For each group the range among `clips` with the least squared error is taken.

    group: halved until it divides K. Raises ValueError when none of 16 or more does.
    """
    size = weight.shape[1]
    while group >= 16 and size % group:
        group //= 2
    if group < 16:
        raise ValueError(f"{size} inputs: expected a multiple of 16")
    parts = [_pack(part.float().unflatten(1, (-1, group)), weight.dtype, clips) for part in weight.split(1024)]
    return Int4Weight(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _pack(groups: Tensor, dtype: torch.dtype, clips: tuple[float, ...]) -> tuple[Tensor, Tensor, Tensor]:
    low, high = groups.aminmax(dim=-1, keepdim=True)
    least = torch.full_like(low, float("inf"))
    best = [torch.zeros_like(groups), torch.zeros_like(low), torch.zeros_like(low)]
    for clip in clips:
        scale = ((high - low) * clip / 15).clamp_min(1e-8).to(dtype).float()
        minimum = (low + (high - low) * (1 - clip) / 2).to(dtype).float()
        q = ((groups - minimum) / scale).round().clamp(0, 15)
        error = (q * scale + minimum - groups).square().sum(-1, keepdim=True)
        better = error < least
        least = torch.where(better, error, least)
        best = [torch.where(better, new, old) for new, old in zip((q, scale, minimum), best, strict=True)]
    q, scale, minimum = best
    half = groups.shape[-1] // 2
    whole = q.to(torch.uint8)
    packed = (whole[..., :half] | (whole[..., half:] << 4)).flatten(1)
    return packed, scale[..., 0].to(dtype), minimum[..., 0].to(dtype)


@triton.jit
def small_float(x: tl.tensor) -> tl.tensor:
    """0…15 as float32 without a conversion instruction, whose rate is a quarter: bits of 2²³ + x, less 2²³."""
    return (x.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def gemv_kernel(
    x_ptr: tl.tensor,
    w_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    minimum_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    o_ptr: tl.tensor,
    n: tl.tensor,
    groups: tl.tensor,
    BIAS: tl.constexpr,
    HALF: tl.constexpr,
    BN: tl.constexpr,
    BG: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One row of x: outputs BN at a time, BG groups of 2 · HALF inputs in flight."""
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = columns < n
    row = tl.where(inside, columns, 0).to(tl.int64)
    j = tl.arange(0, HALF)
    if PDL:
        ahead = tl.minimum(tl.arange(0, AHEAD * BG * HALF // 128) * 128, groups * HALF - 1)
        prefetch(w_ptr + row[:, None] * groups * HALF + ahead[None, :])
    begin(PDL)
    acc = tl.zeros([BN], dtype=tl.float32)
    for start in tl.range(0, groups, BG, num_stages=STAGES):
        g = start + tl.arange(0, BG)
        keep = g < groups
        at = g[:, None] * 2 * HALF + j[None, :]
        first = tl.load(x_ptr + at, mask=keep[:, None], other=0.0).to(tl.float32)
        second = tl.load(x_ptr + at + HALF, mask=keep[:, None], other=0.0).to(tl.float32)
        place = row[:, None, None] * groups * HALF + g[None, :, None] * HALF + j[None, None, :]
        packed = tl.load(w_ptr + place, mask=keep[None, :, None], other=0)
        sums = tl.sum(small_float(packed & 15) * first[None] + small_float(packed >> 4) * second[None], 2)
        at = row[:, None] * groups + g[None, :]
        scale = tl.load(scale_ptr + at, mask=keep[None, :], other=0.0).to(tl.float32)
        minimum = tl.load(minimum_ptr + at, mask=keep[None, :], other=0.0).to(tl.float32)
        acc += tl.sum(sums * scale + minimum * tl.sum(first + second, 1)[None, :], 1)
    if BIAS:
        acc += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(o_ptr + columns, acc.to(o_ptr.dtype.element_ty), mask=inside)


@triton.jit
def product_kernel(
    x_ptr: tl.tensor,
    w_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    minimum_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    o_ptr: tl.tensor,
    m: tl.tensor,
    n: tl.tensor,
    groups: tl.tensor,
    BIAS: tl.constexpr,
    HALF: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    """A few rows of x: q is exact in 16 bits, so one group is two products and one scaling of their sum."""
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    real, inside = rows < m, columns < n
    row = tl.where(inside, columns, 0).to(tl.int64)
    j = tl.arange(0, HALF)
    kind = tl.float32 if UPCAST else x_ptr.dtype.element_ty
    x_rows = x_ptr + rows[:, None] * groups * 2 * HALF + j[None, :]
    acc = tl.zeros([BM, BN], dtype=tl.float32)
    for g in range(groups):
        first = tl.load(x_rows + g * 2 * HALF, mask=real[:, None], other=0.0).to(kind)
        second = tl.load(x_rows + g * 2 * HALF + HALF, mask=real[:, None], other=0.0).to(kind)
        packed = tl.load(w_ptr + row[None, :] * groups * HALF + g * HALF + j[:, None])
        sums = tl.dot(first, small_float(packed & 15).to(kind), input_precision="ieee")
        sums = tl.dot(second, small_float(packed >> 4).to(kind), sums, input_precision="ieee")
        scale = tl.load(scale_ptr + row * groups + g).to(tl.float32)
        minimum = tl.load(minimum_ptr + row * groups + g).to(tl.float32)
        whole = tl.sum(first.to(tl.float32), 1) + tl.sum(second.to(tl.float32), 1)
        acc += sums * scale[None, :] + whole[:, None] * minimum[None, :]
    if BIAS:
        acc += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    to = o_ptr + rows.to(tl.int64)[:, None] * n + columns[None, :]
    tl.store(to, acc.to(o_ptr.dtype.element_ty), mask=real[:, None] & inside[None, :])


def int4_linear_torch(x: Tensor, weight: Int4Weight, bias: Tensor | None = None) -> Tensor:
    """Reference implementation of `int4_linear`: unpack, multiply; some outputs at a time to bound the copy."""
    n, k = weight.shape
    tensors = (weight.packed, weight.scale, weight.minimum)
    # A byte each beside the numbers in the type of the scales, which may then be turned into that of x.
    element = weight.scale.element_size() + max(x.element_size() if x.dtype != weight.scale.dtype else 0, 1)
    return by_parts(x, n, unpacked_rows(k, element), tensors, lambda *p: Int4Weight(*p).dequantize().to(x.dtype), bias)


def int4_linear(
    x: Tensor, weight: Int4Weight, bias: Tensor | None = None, impl: str = "auto", launch: Launch | None = None
) -> Tensor:
    """x (…, K) times the packed weight (N, K) transposed -> (…, N).

    "auto" unpacks for many rows on Turing alone. Raises ValueError for shapes that do not fit.
    """
    n, k = weight.shape
    if x.shape[-1] != k:
        raise ValueError(f"x {tuple(x.shape)} does not fit a weight of {n}x{k}")
    m = x.numel() // k
    good = weight.group >= 32 and weight.group & (weight.group - 1) == 0
    plain = impl == "auto" and m > FEW_ROWS and not tensor_cores(x.device)
    if not use_triton("torch" if plain else impl, x, good, f"group {weight.group} below 32"):
        return int4_linear_torch(x, weight, bias)
    x = x.contiguous()
    launch = launch or for_sm(GEMV if m == 1 else PRODUCT if m <= FEW_ROWS else WIDE, sm_of(x))
    out = x.new_empty(*x.shape[:-1], n)
    arguments = (x, weight.packed, weight.scale, weight.minimum, x if bias is None else bias, out)
    shared = dict(BIAS=bias is not None, HALF=weight.group // 2, BN=launch.block_m)
    options = dict(num_warps=launch.warps, num_stages=launch.stages)
    columns, groups = triton.cdiv(n, launch.block_m), weight.scale.shape[1]
    if m == 1:
        pdl = dependent(sm_of(x))
        gemv_kernel[(columns,)](
            *arguments,
            n,
            groups,
            BG=launch.block_n,
            STAGES=launch.stages,
            PDL=pdl,
            **shared,
            **options,
            **launch_options(pdl),
        )
    else:
        product_kernel[columns, triton.cdiv(m, launch.block_n)](
            *arguments, m, n, groups, BM=launch.block_n,
            UPCAST=interpreting() and x.dtype == torch.bfloat16, **shared, **options,
        )  # fmt: skip
    return out


def specs(sm: int, dtype: str, group: int = 128) -> Iterator[Spec]:
    """What `kernels.aot` compiles: one row (a token), a few (a guess to verify) and many, with
    and without a bias."""
    for bias in (False, True):
        tables = [("gemv", gemv_kernel, GEMV), ("product", product_kernel, PRODUCT), ("wide", product_kernel, WIDE)]
        for name, kernel, table in tables if sm >= min(WIDE) else tables[:2]:
            launch = for_sm(table, sm)
            own = (
                dict(BG=launch.block_n, STAGES=launch.stages, PDL=dependent(sm))
                if name == "gemv"
                else dict(BM=launch.block_n, UPCAST=False)
            )
            yield make_spec(
                f"int4_{name}" + ("_bias" if bias else ""),
                kernel,
                pointers(kernel, dtype, w="u8"),
                dict(BIAS=bias, HALF=group // 2, BN=launch.block_m, **own),
                launch.warps,
                launch.stages,
                unaligned=("groups", *(("m",) if name != "gemv" else ())),
            )
