"""Attention with 8-bit scores: int8 Q and K with a scale a token, then fp8 or 16-bit P·V.

Three kernels. `measure` reads K and V once for what `pack` scales by. `pack` writes [image | time | condition] of K as
int8 (it must be read anyway, so joining the segments is free here) and V beside it: as it was, or as fp8 and
transposed, for 8-bit products want the keys of a channel side by side. `attend` quantizes each query row while it is in
registers, takes scores in int32 and the softmax in float32. Subtracting any one vector from all keys of a head leaves
the softmax as it is; the mean of the image's keys is taken away first because it is what makes int8 too coarse (as
SageAttention found).
fp8 P·V: P is in [0, 1] and becomes e4m3 times 448, V has a scale a head and channel.

Axes as in `segment_attention`; T = N + 1 + L tokens packed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .launch import TENSOR_CORES, Launch, for_sm, for_width, interpreting, sm_of, split_head, upcast, use_triton
from .quantize import quantize_rows_torch, round_e4m3
from .segment_attention import LOG2_E
from .spec import Spec, make_spec, pointers
from .triton_compat import tl, triton

LAUNCHES = {
    80: Launch(block_m=128, block_n=64, warps=8, stages=3),
    90: Launch(block_m=128, block_n=128, warps=8, stages=3),
    100: Launch(block_m=128, block_n=64, warps=8, stages=3),
}
PACK_ROWS = 16
MEASURE_ROWS = 128
ALIGN = 16  # keys of a channel of a transposed V are padded to a multiple
PV = ("fp8", "16bit")


@triton.jit
def measure_kernel(
    ik_ptr: tl.tensor,
    iv_ptr: tl.tensor,
    tv_ptr: tl.tensor,
    cv_ptr: tl.tensor,
    lengths_ptr: tl.tensor,
    sum_ptr: tl.tensor,
    top_ptr: tl.tensor,
    images: tl.tensor,
    heads: tl.tensor,
    share: tl.tensor,
    chunks: tl.tensor,
    ik_b: tl.tensor,
    ik_h: tl.tensor,
    ik_n: tl.tensor,
    tk_b: tl.tensor,
    tk_h: tl.tensor,
    ck_b: tl.tensor,
    ck_h: tl.tensor,
    ck_n: tl.tensor,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    FP8: tl.constexpr,
) -> None:
    """Of ROWS tokens: the sum of the image's keys and the largest magnitude of V, both (B, Hkv, chunks, D)."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    index = tl.program_id(1).to(tl.int64)
    batch, head = index // heads, index % heads
    owner = batch // share
    d = tl.arange(0, PADDED)
    place = (index * chunks + tl.program_id(0)) * D + d
    at = batch * ik_b + head * ik_h + n * ik_n
    image = (n < images)[:, None] & (d < D)[None, :]
    k = tl.load(ik_ptr + at[:, None] + d[None, :], mask=image, other=0.0).to(tl.float32)
    tl.store(sum_ptr + place, tl.sum(k, 0), mask=d < D)
    if FP8:
        # Rows past a branch's length hold what an earlier request left.
        keep = (n < images + 1 + tl.load(lengths_ptr + owner))[:, None] & (d < D)[None, :]
        time = owner * tk_b + head * tk_h
        after = owner * ck_b + head * ck_h + (n - images - 1) * ck_n
        rows = tl.where(n < images, iv_ptr + at, tl.where(n == images, tv_ptr + time, cv_ptr + after))
        v = tl.load(rows[:, None] + d[None, :], mask=keep, other=0.0).to(tl.float32)
        tl.store(top_ptr + place, tl.max(tl.abs(v), 0), mask=d < D)


@triton.jit
def pack_kernel(
    ik_ptr: tl.tensor,
    iv_ptr: tl.tensor,
    tk_ptr: tl.tensor,
    tv_ptr: tl.tensor,
    ck_ptr: tl.tensor,
    cv_ptr: tl.tensor,
    sum_ptr: tl.tensor,
    top_ptr: tl.tensor,
    v_scale_ptr: tl.tensor,
    k_ptr: tl.tensor,
    k_scale_ptr: tl.tensor,
    v_ptr: tl.tensor,
    images: tl.tensor,
    total: tl.tensor,
    padded: tl.tensor,
    chunks: tl.tensor,
    heads: tl.tensor,
    share: tl.tensor,
    ik_b: tl.tensor,
    ik_h: tl.tensor,
    ik_n: tl.tensor,
    tk_b: tl.tensor,
    tk_h: tl.tensor,
    ck_b: tl.tensor,
    ck_h: tl.tensor,
    ck_n: tl.tensor,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    FP8: tl.constexpr,
    EMULATE: tl.constexpr,
) -> None:
    """K and V of a segment share their strides. k (B, Hkv, T, D); k_scale (B, Hkv, T); v (B, Hkv, T, D), or as fp8
    (B, Hkv, D, padded) with v_scale (B, Hkv, D)."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    index = tl.program_id(1).to(tl.int64)
    batch, head = index // heads, index % heads
    owner = batch // share
    d = tl.arange(0, PADDED)
    keep = (n < total)[:, None] & (d < D)[None, :]
    at = batch * ik_b + head * ik_h + n * ik_n
    time = owner * tk_b + head * tk_h
    after = owner * ck_b + head * ck_h + (n - images - 1) * ck_n
    k_rows = tl.where(n < images, ik_ptr + at, tl.where(n == images, tk_ptr + time, ck_ptr + after))
    v_rows = tl.where(n < images, iv_ptr + at, tl.where(n == images, tv_ptr + time, cv_ptr + after))
    k = tl.load(k_rows[:, None] + d[None, :], mask=keep, other=0.0).to(tl.float32)
    chunk = tl.arange(0, CHUNKS)
    parts = (index * chunks + chunk)[:, None] * D + d[None, :]
    known = (chunk < chunks)[:, None] & (d < D)[None, :]
    k = k - (tl.sum(tl.load(sum_ptr + parts, mask=known, other=0.0), 0) / images)[None, :]
    k = tl.where(keep, k, 0.0)
    scale = tl.maximum(tl.max(tl.abs(k), 1) / 127.0, 1e-12)
    k = (k / scale[:, None] + 12582912.0) - 12582912.0
    place = index * total + n
    tl.store(k_ptr + place[:, None] * D + d[None, :], k.to(tl.int8), mask=keep)
    tl.store(k_scale_ptr + place, scale, mask=n < total)
    v = tl.load(v_rows[:, None] + d[None, :], mask=keep, other=0.0)
    if FP8:
        v_scale = tl.maximum(tl.max(tl.load(top_ptr + parts, mask=known, other=0.0), 0) / 448.0, 1e-12)
        if tl.program_id(0) == 0:
            tl.store(v_scale_ptr + index * D + d, v_scale, mask=d < D)
        v = v.to(tl.float32) / v_scale[None, :]
        v = tl.minimum(tl.maximum(v, -448.0), 448.0)
        if EMULATE:
            v = round_e4m3(v)
        to = v_ptr + (index * D + d)[None, :] * padded + n[:, None]
        tl.store(to, v.to(v_ptr.dtype.element_ty), mask=keep)
    else:
        tl.store(v_ptr + place[:, None] * D + d[None, :], v.to(v_ptr.dtype.element_ty), mask=keep)


@triton.jit
def attend_eight(
    acc0: tl.tensor,
    acc1: tl.tensor,
    top: tl.tensor,
    sums: tl.tensor,
    q0: tl.tensor,
    q1: tl.tensor,
    q_scale: tl.tensor,
    k_rows: tl.tensor,
    k_scale: tl.tensor,
    v_rows: tl.tensor,
    v_d: tl.tensor,
    keep: tl.tensor,
    D0: tl.constexpr,
    D1: tl.constexpr,
    MASKED: tl.constexpr,
    FP8: tl.constexpr,
    EMULATE: tl.constexpr,
    UPCAST: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """One block of keys under the running softmax; k_rows, v_rows, k_scale: pointers (BN,); v_d: between channels."""
    d0, d1 = tl.arange(0, D0), D0 + tl.arange(0, D1)
    if MASKED:
        k0 = tl.load(k_rows[None, :] + d0[:, None], mask=keep[None, :], other=0)
        k1 = tl.load(k_rows[None, :] + d1[:, None], mask=keep[None, :], other=0)
        v0 = tl.load(v_rows[:, None] + d0[None, :] * v_d, mask=keep[:, None], other=0.0)
        v1 = tl.load(v_rows[:, None] + d1[None, :] * v_d, mask=keep[:, None], other=0.0)
        scale = tl.load(k_scale, mask=keep, other=0.0)
    else:
        k0, k1 = tl.load(k_rows[None, :] + d0[:, None]), tl.load(k_rows[None, :] + d1[:, None])
        v0, v1 = tl.load(v_rows[:, None] + d0[None, :] * v_d), tl.load(v_rows[:, None] + d1[None, :] * v_d)
        scale = tl.load(k_scale)
    scores = tl.dot(q0, k0, out_dtype=tl.int32)
    scores = tl.dot(q1, k1, scores, out_dtype=tl.int32)
    s = scores.to(tl.float32) * (q_scale[:, None] * scale[None, :])
    if MASKED:
        s = tl.where(keep[None, :], s, float("-inf"))
    new_top = tl.maximum(top, tl.max(s, 1))
    shrink = tl.exp2(top - new_top)
    p = tl.exp2(s - new_top[:, None])
    sums = sums * shrink + tl.sum(p, 1)
    if FP8:
        p = p * 448.0
        if EMULATE:
            p = round_e4m3(p)
    if UPCAST:
        v0, v1 = v0.to(tl.float32), v1.to(tl.float32)
    p = p.to(v0.dtype)
    acc0 = tl.dot(p, v0, acc0 * shrink[:, None], input_precision="ieee")
    acc1 = tl.dot(p, v1, acc1 * shrink[:, None], input_precision="ieee")
    return acc0, acc1, new_top, sums


@triton.jit
def attend_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    k_scale_ptr: tl.tensor,
    v_ptr: tl.tensor,
    v_scale_ptr: tl.tensor,
    o_ptr: tl.tensor,
    lengths_ptr: tl.tensor,
    scale: tl.tensor,
    queries: tl.tensor,
    images: tl.tensor,
    total: tl.tensor,
    padded: tl.tensor,
    heads: tl.tensor,
    share: tl.tensor,
    q_b: tl.tensor,
    q_h: tl.tensor,
    q_n: tl.tensor,
    o_b: tl.tensor,
    o_h: tl.tensor,
    o_n: tl.tensor,
    GROUP: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    FP8: tl.constexpr,
    EMULATE: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    kv = batch * (heads // GROUP) + head // GROUP
    D: tl.constexpr = D0 + D1
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    d0, d1 = tl.arange(0, D0), D0 + tl.arange(0, D1)
    inside = rows[:, None] < queries
    q_rows = q_ptr + batch * q_b + head * q_h + rows[:, None] * q_n
    q0 = tl.load(q_rows + d0[None, :], mask=inside, other=0.0).to(tl.float32)
    q1 = tl.load(q_rows + d1[None, :], mask=inside, other=0.0).to(tl.float32)
    q_scale = tl.maximum(tl.maximum(tl.max(tl.abs(q0), 1), tl.max(tl.abs(q1), 1)) / 127.0, 1e-12)
    q0 = ((q0 / q_scale[:, None] + 12582912.0) - 12582912.0).to(tl.int8)
    q1 = ((q1 / q_scale[:, None] + 12582912.0) - 12582912.0).to(tl.int8)
    q_scale = q_scale * scale

    acc0 = tl.zeros([BM, D0], dtype=tl.float32)
    acc1 = tl.zeros([BM, D1], dtype=tl.float32)
    top = tl.full([BM], float("-inf"), dtype=tl.float32)
    sums = tl.zeros([BM], dtype=tl.float32)
    columns = tl.arange(0, BN)
    length = images + 1 + tl.load(lengths_ptr + batch // share)
    keys, scales = k_ptr + kv * total * D, k_scale_ptr + kv * total
    values = v_ptr + kv * D * (padded if FP8 else total)
    v_n, v_d = 1 if FP8 else D, padded if FP8 else 1
    whole = (length // BN) * BN
    for start in range(0, whole, BN):
        n = start + columns
        acc0, acc1, top, sums = attend_eight(
            acc0, acc1, top, sums, q0, q1, q_scale, keys + n * D, scales + n, values + n * v_n, v_d, n < length,
            D0, D1, False, FP8, EMULATE, UPCAST,
        )  # fmt: skip
    if whole < length:
        n = whole + columns
        acc0, acc1, top, sums = attend_eight(
            acc0, acc1, top, sums, q0, q1, q_scale, keys + n * D, scales + n, values + n * v_n, v_d, n < length,
            D0, D1, True, FP8, EMULATE, UPCAST,
        )  # fmt: skip
    o_rows = o_ptr + batch * o_b + head * o_h + rows[:, None] * o_n
    weight = 1.0 / sums[:, None]
    if FP8:
        v_scale0 = tl.load(v_scale_ptr + kv * D + d0)
        v_scale1 = tl.load(v_scale_ptr + kv * D + d1)
        acc0 = acc0 * v_scale0[None, :] * (1.0 / 448.0)
        acc1 = acc1 * v_scale1[None, :] * (1.0 / 448.0)
    tl.store(o_rows + d0[None, :], (acc0 * weight).to(o_ptr.dtype.element_ty), mask=inside)
    tl.store(o_rows + d1[None, :], (acc1 * weight).to(o_ptr.dtype.element_ty), mask=inside)


Pair = tuple[Tensor, Tensor]


def _statistics(condition: Pair, time: Pair, image: Pair, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """(mean of the image's keys, scale of each channel of V), float32 (B, Hkv, D)."""
    mean, values = image[0].mean(2, dtype=torch.float32), condition[1]
    if lengths is not None:  # rows past a branch's length hold what an earlier request left
        places = torch.arange(values.shape[2], device=values.device)
        values = values.masked_fill((places >= lengths[:, None])[:, None, :, None], 0)
    prefix = torch.maximum(values.abs().amax(2), time[1].abs())
    prefix = prefix.repeat_interleave(mean.shape[0] // prefix.shape[0], 0)
    return mean, (torch.maximum(image[1].abs().amax(2), prefix).float() / 448).clamp_min(1e-12)


def int8_attention_torch(
    q: Tensor, condition: Pair, time: Pair, image: Pair, lengths: Tensor | None = None, pv: str = "fp8"
) -> Tensor:
    """Reference implementation of `int8_attention`, with every rounding but that of P against a running maximum."""
    batch, group = q.shape[0], q.shape[1] // image[0].shape[1]
    mean, v_scale = _statistics(condition, time, image, lengths)
    share = batch // condition[0].shape[0]
    out = []
    for row in range(batch):
        owner = row // share
        length = condition[0].shape[2] if lengths is None else int(lengths[owner])
        k, v = (
            torch.cat([image[i][row], time[i][owner].unsqueeze(1), condition[i][owner][:, :length]], dim=1)
            for i in (0, 1)
        )
        keys = quantize_rows_torch(k.float() - mean[row].unsqueeze(1), "int8").dequantize()
        scores = quantize_rows_torch(q[row], "int8").dequantize() @ keys.repeat_interleave(group, 0).transpose(1, 2)
        p = (scores * q.shape[-1] ** -0.5).float()
        p = (p - p.amax(-1, keepdim=True)).exp()
        sums = p.sum(-1, keepdim=True)
        values = v.float()
        if pv == "fp8":
            scale = v_scale[row].unsqueeze(1)
            values = (values / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
            p = (p * 448).to(torch.float8_e4m3fn).float() / 448
        else:
            p = p.to(q.dtype).float()
        out.append(p @ values.repeat_interleave(group, 0) / sums)
    return torch.stack(out).to(q.dtype)


def int8_attention(
    q: Tensor,
    condition: Pair,
    time: Pair,
    image: Pair,
    lengths: Tensor | None = None,
    pv: str = "fp8",
    impl: str = "auto",
    launch: Launch | None = None,
) -> Tensor:
    """As `segment_attention`, in 8 bits. pv: "fp8" (Ada and later) or "16bit".

    head_dim must be the sum of two powers of two of 32 or more. K and V of a segment must have the same strides.
    Returns (B, Hq, N, D) stored as (B, N, Hq, D). Raises ValueError for what does not fit.
    """
    if pv not in PV:
        raise ValueError(f"pv {pv!r}: expected one of {', '.join(PV)}")
    batch, heads, queries, head_dim = q.shape
    kv_heads, images = image[0].shape[1:3]
    d0, d1 = split_head(head_dim)
    if not use_triton(impl, q, d1 >= 32, f"head_dim {head_dim} is not the sum of two powers of two of 32 or more"):
        return int8_attention_torch(q, condition, time, image, lengths, pv)
    for name, (k, v) in (("condition", condition), ("time", time), ("image", image)):
        if k.stride() != v.stride() or k.stride(-1) != 1:
            raise ValueError(f"{name}: K and V need the same strides and a contiguous last axis")
    launch = launch or for_width(for_sm(LAUNCHES, sm_of(q)), q.dtype == torch.float32)
    fp8, prefixes, capacity = pv == "fp8", *condition[0].shape[0::2][:2]
    if lengths is None:
        lengths = torch.full((prefixes,), capacity, dtype=torch.int32, device=q.device)
    total = images + 1 + capacity
    padded, chunks = triton.cdiv(total, ALIGN) * ALIGN, triton.cdiv(total, MEASURE_ROWS)
    keys = torch.empty(batch, kv_heads, total, head_dim, dtype=torch.int8, device=q.device)
    if fp8:
        values = torch.empty(batch, kv_heads, head_dim, padded, dtype=torch.float8_e4m3fn, device=q.device)
    else:
        values = torch.empty_like(keys, dtype=q.dtype)
    k_scale = torch.empty(batch, kv_heads, total, dtype=torch.float32, device=q.device)
    sums, tops = torch.empty(2, batch, kv_heads, chunks, head_dim, dtype=torch.float32, device=q.device)
    v_scale = torch.empty(batch, kv_heads, head_dim, dtype=torch.float32, device=q.device)
    share, wide = batch // prefixes, triton.next_power_of_2(head_dim)
    strides = (*image[0].stride()[:3], *time[0].stride()[:2], *condition[0].stride()[:3])
    measure_kernel[chunks, batch * kv_heads](
        *image, time[1], condition[1], lengths, sums, tops, images, kv_heads, share, chunks, *strides,
        ROWS=MEASURE_ROWS, D=head_dim, PADDED=wide, FP8=fp8, num_warps=4,
    )  # fmt: skip
    pack_kernel[triton.cdiv(total, PACK_ROWS), batch * kv_heads](
        *image, *time, *condition, sums, tops, v_scale, keys, k_scale, values,
        images, total, padded, chunks, kv_heads, share, *strides,
        ROWS=PACK_ROWS, CHUNKS=triton.next_power_of_2(chunks), D=head_dim, PADDED=wide, FP8=fp8,
        EMULATE=interpreting(), num_warps=4,
    )  # fmt: skip
    out = q.new_empty(batch, queries, heads, head_dim).transpose(1, 2)
    attend_kernel[triton.cdiv(queries, launch.block_m), batch * heads](
        q, keys, k_scale, values, v_scale, out, lengths, head_dim**-0.5 * LOG2_E,
        queries, images, total, padded, heads, share, *q.stride()[:3], *out.stride()[:3],
        GROUP=heads // kv_heads, D0=d0, D1=d1, BM=launch.block_m, BN=launch.block_n, FP8=fp8, EMULATE=interpreting(),
        UPCAST=upcast(q) and not fp8, num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
    return out


def specs(sm: int, dtype: str, head_dim: int = 96, group: int = 1) -> Iterator[Spec]:
    """What `kernels.aot` compiles: both kinds of P·V where the SM has them, and their packing. Nothing on Turing."""
    if sm < TENSOR_CORES:
        return
    launch, (d0, d1) = for_width(for_sm(LAUNCHES, sm), dtype == "fp32"), split_head(head_dim)
    own = dict(GROUP=group, D0=d0, D1=d1, BM=launch.block_m, BN=launch.block_n, EMULATE=False, UPCAST=False)
    floats = dict(k="i8", k_scale="fp32", v_scale="fp32")
    sizes, packing = ("images", "total", "heads", "share"), dict(D=head_dim, PADDED=triton.next_power_of_2(head_dim))
    for pv in PV if sm >= 89 else PV[1:]:
        v = "fp8e4nv" if pv == "fp8" else dtype
        yield make_spec(
            f"int8_attention_{head_dim}_{pv}",
            attend_kernel,
            {**pointers(attend_kernel, dtype, **floats, v=v, lengths="i32"), "scale": "fp32"},
            dict(**own, FP8=pv == "fp8"),
            launch.warps,
            launch.stages,
            unaligned=("queries", *sizes),
        )
        yield make_spec(
            f"int8_attention_{head_dim}_pack_{pv}",
            pack_kernel,
            pointers(pack_kernel, dtype, **floats, v=v, sum="fp32", top="fp32"),
            dict(ROWS=PACK_ROWS, CHUNKS=64, **packing, FP8=pv == "fp8", EMULATE=False),
            4,
            1,
            unaligned=(*sizes, "chunks"),
        )
        yield make_spec(
            f"int8_attention_{head_dim}_measure_{pv}",
            measure_kernel,
            pointers(measure_kernel, dtype, lengths="i32", sum="fp32", top="fp32"),
            dict(ROWS=MEASURE_ROWS, **packing, FP8=pv == "fp8"),
            4,
            1,
            unaligned=("images", "heads", "share", "chunks"),
        )  # fmt: skip
