"""GroupNorm and the SiLU after it, over pictures that lie channels-last (NHWC), as convolutions on tensor cores want.

torch's GroupNorm on a GPU makes such a picture contiguous (NCHW), and the next convolution turns it back. Here three
launches leave it as it lies: mean and squared deviations of each channel in parts of the picture (by Welford's sums: a
mean far from zero costs no digits), their sum over a group in a fixed order, and the normalization.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from .launch import Launch, for_sm, sm_of, use_triton
from .spec import Spec, make_spec, pointers
from .triton_compat import tl, triton

# Places and channels of a tile; stages are loads in flight, which Turing cannot have.
LAUNCHES = {
    75: Launch(block_m=32, block_n=64, warps=4, stages=1),
    80: Launch(block_m=32, block_n=64, warps=4, stages=3),
}
LARGEST_PART = 1024  # places of a part: few enough parts for one program to add up
PARTS = 64  # that small pictures are split into
COMBINED, COMBINE_WARPS = 2048, 8  # sums that one program adds at once

Moments = tuple[Tensor, Tensor]
"""Variance and mean of each group, both (B, groups) float32."""


@triton.jit
def moments_kernel(
    x_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    stride: tl.tensor,
    places: tl.tensor,
    channels: tl.tensor,
    rows: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    part, picture = tl.program_id(0), tl.program_id(2)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside, first = columns < channels, part * rows
    x_ptr += picture.to(tl.int64) * stride + first.to(tl.int64) * channels
    mean = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    squares = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    count = tl.zeros((BLOCK_M, 1), tl.float32)
    for start in tl.range(0, rows, BLOCK_M, num_stages=STAGES):
        row = (start + tl.arange(0, BLOCK_M))[:, None]
        keep = first + row < places
        x = tl.load(x_ptr + row * channels + columns[None, :], mask=keep & inside[None, :], other=0.0).to(tl.float32)
        count += keep.to(tl.float32)
        away = tl.where(keep, x - mean, 0.0)
        mean += away * (1.0 / tl.maximum(count, 1.0))
        squares += away * (x - mean)
    number = tl.minimum(rows, places - first).to(tl.float32)
    whole = tl.sum(mean * count, 0) / number
    whole += tl.sum((mean - whole[None, :]) * count, 0) / number  # what the sum above has rounded away
    apart = mean - whole[None, :]
    squares += count * apart * apart
    # Sums of one group lie together: (B, 2, channels, parts).
    place = (picture.to(tl.int64) * 2 * channels + columns) * tl.num_programs(0) + part
    tl.store(sums_ptr + place, whole, mask=inside)
    tl.store(sums_ptr + place + channels * tl.num_programs(0), tl.sum(squares, 0), mask=inside)


@triton.jit
def combine_kernel(
    sums_ptr: tl.tensor,
    variance_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    places: tl.tensor,
    rows: tl.tensor,
    parts: tl.tensor,
    each: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    group, picture, groups = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    size = each * parts
    sums_ptr += (picture.to(tl.int64) * 2 * groups + group) * size
    numbers = places.to(tl.float32) * each
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        count = tl.minimum(rows, places - at % parts * rows).to(tl.float32)
        total += count * tl.load(sums_ptr + at, mask=at < size, other=0.0)
    about = tl.sum(total, 0) / numbers
    rest = tl.zeros((BLOCK,), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        count = tl.minimum(rows, places - at % parts * rows).to(tl.float32)
        apart = tl.where(at < size, tl.load(sums_ptr + at, mask=at < size, other=0.0) - about, 0.0)
        rest += count * apart
        total += count * apart * apart + tl.load(sums_ptr + groups * size + at, mask=at < size, other=0.0)
    rounded = tl.sum(rest, 0) / numbers  # what the first sum has rounded away
    tl.store(variance_ptr + picture * groups + group, tl.sum(total, 0) / numbers - rounded * rounded)
    tl.store(mean_ptr + picture * groups + group, about + rounded)


@triton.jit
def normalize_kernel(
    x_ptr: tl.tensor,
    y_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    variance_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    eps: tl.tensor,
    stride: tl.tensor,
    places: tl.tensor,
    channels: tl.tensor,
    rows: tl.tensor,
    each: tl.tensor,
    SILU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    picture = tl.program_id(2).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside, first = columns < channels, tl.program_id(0) * rows
    group = picture * (channels // each) + columns // each
    mean = tl.load(mean_ptr + group, mask=inside, other=0.0)[None, :]
    variance = tl.load(variance_ptr + group, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    scale = (weight * (1.0 / tl.sqrt(variance + eps)))[None, :]
    bias = tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    x_ptr += picture * stride + first.to(tl.int64) * channels
    y_ptr += (picture * places + first) * channels
    for start in tl.range(0, rows, BLOCK_M, num_stages=STAGES):
        row = (start + tl.arange(0, BLOCK_M))[:, None]
        at, keep = row * channels + columns[None, :], (first + row < places) & inside[None, :]
        y = (tl.load(x_ptr + at, mask=keep, other=0.0).to(tl.float32) - mean) * scale + bias
        if SILU:
            y = y / (1.0 + tl.exp(-y))
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=keep)


def channels_last(x: Tensor) -> bool:
    """Whether each picture of x (B, C, H, W) lies as rows of places with all their channels."""
    return x.dim() == 4 and x[:1].is_contiguous(memory_format=torch.channels_last)


def _on_triton(impl: str, x: Tensor) -> bool:
    return use_triton(impl, x, channels_last(x), f"x {tuple(x.shape)}: expected (B, C, H, W) stored channels-last")


def _split(x: Tensor) -> tuple[Launch, int, int, tuple[int, int, int]]:
    """(tile, places, places of a part, grid). The split, and with it rounding, depends on the shape alone."""
    batch, channels, height, width = x.shape
    launch, places = for_sm(LAUNCHES, sm_of(x)), height * width
    rows = min(LARGEST_PART, max(launch.block_m, triton.next_power_of_2(triton.cdiv(places, PARTS))))
    return launch, places, rows, (triton.cdiv(places, rows), triton.cdiv(channels, launch.block_n), batch)


def group_moments_torch(x: Tensor, groups: int) -> Moments:
    """Reference implementation of `group_moments`."""
    variance, mean = torch.var_mean(x.float().reshape(x.shape[0], groups, -1), dim=-1, correction=0)
    return variance, mean


def group_moments(x: Tensor, groups: int, impl: str = "auto") -> Moments:
    """x (B, C, H, W) -> variance and mean of each group of channels."""
    if not _on_triton(impl, x):
        return group_moments_torch(x, groups)
    (batch, channels), (launch, places, rows, grid) = x.shape[:2], _split(x)
    sums = torch.empty(batch, 2, channels, grid[0], dtype=torch.float32, device=x.device)
    variance, mean = (torch.empty(batch, groups, dtype=torch.float32, device=x.device) for _ in range(2))
    moments_kernel[grid](
        x, sums, x.stride(0), places, channels, rows,
        BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, STAGES=launch.stages, num_warps=launch.warps,
    )  # fmt: skip
    combine_kernel[groups, batch](
        sums, variance, mean, places, rows, grid[0], channels // groups, BLOCK=COMBINED, num_warps=COMBINE_WARPS
    )
    return variance, mean


def group_norm_torch(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool = True, moments: Moments | None = None
) -> Tensor:
    """Reference implementation of `group_norm`."""
    if moments is None:
        y = F.group_norm(x, groups, weight, bias, eps)
    else:
        each = x.shape[1] // groups
        variance, mean = (moment.repeat_interleave(each, 1) for moment in moments)
        scale = torch.rsqrt(variance + eps) * weight.float()
        shift = bias.float() - mean * scale
        y = torch.addcmul(shift[..., None, None], x.float(), scale[..., None, None]).to(x.dtype)
    return F.silu(y) if silu else y


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    silu: bool = True,
    moments: Moments | None = None,
    impl: str = "auto",
) -> Tensor:
    """x (B, C, H, W) normalized in groups of channels, times weight, plus bias; with `silu` its SiLU.

    moments: of the whole picture where x is a part of it; x's own unless given. "auto" is Triton for what lies
    channels-last on CUDA, and the result lies so too.
    """
    if not _on_triton(impl, x):
        return group_norm_torch(x, groups, weight, bias, eps, silu, moments)
    variance, mean = group_moments(x, groups, impl) if moments is None else moments
    launch, places, rows, grid = _split(x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    normalize_kernel[grid](
        x, y, weight, bias, variance.contiguous(), mean.contiguous(), eps, x.stride(0), places, x.shape[1], rows,
        x.shape[1] // groups, SILU=silu, BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, STAGES=launch.stages,
        num_warps=launch.warps,
    )  # fmt: skip
    return y


def specs(sm: int, dtype: str) -> Iterator[Spec]:
    """What `kernels.aot` compiles: norms of 512 channels in 32 groups, with the SiLU and without."""
    launch = for_sm(LAUNCHES, sm)
    tile = dict(BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, STAGES=launch.stages)
    yield make_spec(
        "group_norm_moments", moments_kernel, pointers(moments_kernel, dtype, sums="fp32"), tile, launch.warps, 1
    )
    types = pointers(combine_kernel, "fp32")
    yield make_spec("group_norm_combine", combine_kernel, types, dict(BLOCK=COMBINED), COMBINE_WARPS, 1)
    types = {**pointers(normalize_kernel, dtype, variance="fp32", mean="fp32"), "eps": "fp32"}
    for silu in (True, False):
        name = f"group_norm{'_silu' if silu else ''}"
        yield make_spec(name, normalize_kernel, types, dict(SILU=silu, **tile), launch.warps, 1)
