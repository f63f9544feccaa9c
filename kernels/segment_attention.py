"""Attention of image tokens over separate segments: [condition | time token | image]. No mask, no concatenation.

A denoise step has N image queries; each sees all of its branch's condition (constant over the schedule, its own length
per batch row), this step's time token, and the image. The kernel reads the three where they lie: rows of a batch may
have different condition lengths, so the guided and the unguided branch are one launch. A head of 96 is 64 + 32 columns
in two matrix products, not 128 padded. GQA by integer division of the head index.

Axes: B batch, Hq query heads, Hkv key heads, N image tokens, L condition capacity, D head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .launch import Launch, for_sm, for_width, sm_of, split_head, upcast, use_triton
from .spec import Spec, make_spec, pointers
from .triton_compat import tl, triton

# Reasons in docs/kernels.md. Turing: 64 KiB and no asynchronous copies. 86, 89, 120, 121: 99 KiB. Hopper and the data
# centre's Blackwell want 64 rows for each group of four warps. None is measured yet.
LAUNCHES = {
    75: Launch(block_m=64, block_n=32, warps=8, stages=2),
    80: Launch(block_m=128, block_n=64, warps=8, stages=3),
    86: Launch(block_m=128, block_n=32, warps=4, stages=3),
    87: Launch(block_m=128, block_n=64, warps=8, stages=2),
    90: Launch(block_m=128, block_n=128, warps=8, stages=2),
    100: Launch(block_m=128, block_n=64, warps=8, stages=3),
    120: Launch(block_m=128, block_n=64, warps=8, stages=2),
}
LOG2_E = 1 / math.log(2)


@triton.jit
def attend_block(
    acc0: tl.tensor,
    acc1: tl.tensor,
    top: tl.tensor,
    total: tl.tensor,
    q0: tl.tensor,
    q1: tl.tensor,
    k_rows: tl.tensor,
    v_rows: tl.tensor,
    keep: tl.tensor,
    scale: tl.tensor,
    D0: tl.constexpr,
    D1: tl.constexpr,
    MASKED: tl.constexpr,
    UPCAST: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """One block of keys under the running softmax. k_rows, v_rows: pointers to rows (BN,); scale in base 2."""
    d0 = tl.arange(0, D0)
    d1 = D0 + tl.arange(0, D1)
    if MASKED:
        k0 = tl.load(k_rows[None, :] + d0[:, None], mask=keep[None, :], other=0.0)
        k1 = tl.load(k_rows[None, :] + d1[:, None], mask=keep[None, :], other=0.0)
        v0 = tl.load(v_rows[:, None] + d0[None, :], mask=keep[:, None], other=0.0)
        v1 = tl.load(v_rows[:, None] + d1[None, :], mask=keep[:, None], other=0.0)
    else:
        k0 = tl.load(k_rows[None, :] + d0[:, None])
        k1 = tl.load(k_rows[None, :] + d1[:, None])
        v0 = tl.load(v_rows[:, None] + d0[None, :])
        v1 = tl.load(v_rows[:, None] + d1[None, :])
    if UPCAST:
        k0, k1 = k0.to(tl.float32), k1.to(tl.float32)
        v0, v1 = v0.to(tl.float32), v1.to(tl.float32)
    scores = tl.dot(q0, k0, input_precision="ieee")
    scores = tl.dot(q1, k1, scores, input_precision="ieee") * scale
    if MASKED:
        scores = tl.where(keep[None, :], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    shrink = tl.exp2(top - new_top)
    p = tl.exp2(scores - new_top[:, None])
    total = total * shrink + tl.sum(p, 1)
    p = p.to(v0.dtype)
    acc0 = tl.dot(p, v0, acc0 * shrink[:, None], input_precision="ieee")
    acc1 = tl.dot(p, v1, acc1 * shrink[:, None], input_precision="ieee")
    return acc0, acc1, new_top, total


@triton.jit
def segment_kernel(
    q_ptr: tl.tensor,
    ck_ptr: tl.tensor,
    cv_ptr: tl.tensor,
    tk_ptr: tl.tensor,
    tv_ptr: tl.tensor,
    ik_ptr: tl.tensor,
    iv_ptr: tl.tensor,
    o_ptr: tl.tensor,
    lengths_ptr: tl.tensor,
    scale: tl.tensor,
    queries: tl.tensor,
    images: tl.tensor,
    capacity: tl.tensor,
    heads: tl.tensor,
    share: tl.tensor,
    q_b: tl.tensor,
    q_h: tl.tensor,
    q_n: tl.tensor,
    ck_b: tl.tensor,
    ck_h: tl.tensor,
    ck_n: tl.tensor,
    cv_b: tl.tensor,
    cv_h: tl.tensor,
    cv_n: tl.tensor,
    tk_b: tl.tensor,
    tk_h: tl.tensor,
    tv_b: tl.tensor,
    tv_h: tl.tensor,
    ik_b: tl.tensor,
    ik_h: tl.tensor,
    ik_n: tl.tensor,
    iv_b: tl.tensor,
    iv_h: tl.tensor,
    iv_n: tl.tensor,
    o_b: tl.tensor,
    o_h: tl.tensor,
    o_n: tl.tensor,
    GROUP: tl.constexpr,
    HAS_TIME: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    kv_head = head // GROUP
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    d0 = tl.arange(0, D0)
    d1 = D0 + tl.arange(0, D1)
    inside = rows[:, None] < queries
    q_rows = q_ptr + batch * q_b + head * q_h + rows[:, None] * q_n
    q0 = tl.load(q_rows + d0[None, :], mask=inside, other=0.0)
    q1 = tl.load(q_rows + d1[None, :], mask=inside, other=0.0)
    if UPCAST:
        q0, q1 = q0.to(tl.float32), q1.to(tl.float32)

    acc0 = tl.zeros([BM, D0], dtype=tl.float32)
    acc1 = tl.zeros([BM, D1], dtype=tl.float32)
    top = tl.full([BM], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BM], dtype=tl.float32)
    columns = tl.arange(0, BN)

    # Condition and time token share their blocks: the token stands at the condition's end, by pointer. A block of its
    # own would spend BN columns of matrix product on one key.
    owner = batch // share
    length = capacity
    if HAS_LENGTHS:
        length = tl.load(lengths_ptr + owner)
    ck = ck_ptr + owner * ck_b + kv_head * ck_h
    cv = cv_ptr + owner * cv_b + kv_head * cv_h
    prefix = length
    if HAS_TIME:
        prefix = length + 1
    for start in range(0, prefix, BN):
        n = start + columns
        k_rows = ck + n * ck_n
        v_rows = cv + n * cv_n
        if HAS_TIME:
            k_rows = tl.where(n == length, tk_ptr + owner * tk_b + kv_head * tk_h, k_rows)
            v_rows = tl.where(n == length, tv_ptr + owner * tv_b + kv_head * tv_h, v_rows)
        acc0, acc1, top, total = attend_block(
            acc0, acc1, top, total, q0, q1, k_rows, v_rows, n < prefix, scale, D0, D1, True, UPCAST
        )

    ik = ik_ptr + batch * ik_b + kv_head * ik_h
    iv = iv_ptr + batch * iv_b + kv_head * iv_h
    whole = (images // BN) * BN
    for start in range(0, whole, BN):
        n = start + columns
        acc0, acc1, top, total = attend_block(
            acc0, acc1, top, total, q0, q1, ik + n * ik_n, iv + n * iv_n, n < images, scale, D0, D1, False, UPCAST
        )
    if whole < images:
        n = whole + columns
        acc0, acc1, top, total = attend_block(
            acc0, acc1, top, total, q0, q1, ik + n * ik_n, iv + n * iv_n, n < images, scale, D0, D1, True, UPCAST
        )

    o_rows = o_ptr + batch * o_b + head * o_h + rows[:, None] * o_n
    weight = 1.0 / total[:, None]
    tl.store(o_rows + d0[None, :], (acc0 * weight).to(o_ptr.dtype.element_ty), mask=inside)
    tl.store(o_rows + d1[None, :], (acc1 * weight).to(o_ptr.dtype.element_ty), mask=inside)


def segment_attention_torch(
    q: Tensor,
    condition: tuple[Tensor, Tensor],
    time: tuple[Tensor, Tensor] | None = None,
    image: tuple[Tensor, Tensor] | None = None,
    lengths: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Reference implementation of `segment_attention`: row by row, the segments side by side under one softmax."""
    batch, heads = q.shape[:2]
    share = batch // condition[0].shape[0]
    rows = []
    for index in range(batch):
        length = condition[0].shape[2] if lengths is None else int(lengths[index // share])

        def row(segment: Tensor, index: int = index) -> Tensor:
            return segment[index * segment.shape[0] // batch]

        sides = []
        for side in (0, 1):
            parts = [row(condition[side])[:, :length]]
            if time is not None:
                parts.append(row(time[side]).unsqueeze(1))
            if image is not None:
                parts.append(row(image[side]))
            joined = torch.cat(parts, dim=1)
            sides.append(joined.repeat_interleave(heads // joined.shape[0], dim=0))
        scores = q[index] @ sides[0].transpose(-1, -2) * (scale or q.shape[-1] ** -0.5)
        rows.append(scores.softmax(-1) @ sides[1])
    return torch.stack(rows)


def segment_attention(
    q: Tensor,
    condition: tuple[Tensor, Tensor],
    time: tuple[Tensor, Tensor] | None = None,
    image: tuple[Tensor, Tensor] | None = None,
    lengths: Tensor | None = None,
    scale: float | None = None,
    out: Tensor | None = None,
    impl: str = "auto",
    launch: Launch | None = None,
) -> Tensor:
    """softmax(q · [condition | time | image]ᵀ · scale) · [V of the same], for every query, without a mask.

    q (B, Hq, N, D); condition K and V (P, Hkv, L, D) and time K and V (P, Hkv, D), where P divides B and row b takes
    prefix b // (B / P): the images of one branch stand together. lengths (P,) int32 on the device: prefix p uses its
    first lengths[p] rows; None uses all L. image K and V (B, Hkv, Ni, D). Any strides with a contiguous D. Every row
    needs at least one key. scale is 1/sqrt(D) unless given. Returns (B, Hq, N, D), stored as (B, N, Hq, D) so that
    joining the heads is free. float16, bfloat16 or float32 (float32 for tests).
    Raises ValueError for shapes that do not fit.
    """
    batch, heads, queries, head_dim = q.shape
    kv_heads = condition[0].shape[1]
    _check(q, condition, time, image, lengths)
    d0, d1 = split_head(head_dim)
    if not use_triton(impl, q, d0 > 0, f"head_dim {head_dim} is not the sum of two powers of two of 16 or more"):
        result = segment_attention_torch(q, condition, time, image, lengths, scale)
        return result if out is None else out.copy_(result)
    launch = launch or for_width(for_sm(LAUNCHES, sm_of(q)), q.dtype == torch.float32)
    if out is None:
        out = q.new_empty(batch, queries, heads, head_dim).transpose(1, 2)
    ck, cv = condition
    tk, tv = time or (ck[:, :, 0], cv[:, :, 0])
    ik, iv = image or (ck[:, :, :0], cv[:, :, :0])
    segment_kernel[triton.cdiv(queries, launch.block_m), batch * heads](
        q, ck, cv, tk, tv, ik, iv, out, q if lengths is None else lengths,
        (scale or head_dim**-0.5) * LOG2_E,
        queries, ik.shape[2], ck.shape[2], heads, batch // ck.shape[0],
        *q.stride()[:3], *ck.stride()[:3], *cv.stride()[:3], *tk.stride()[:2], *tv.stride()[:2],
        *ik.stride()[:3], *iv.stride()[:3], *out.stride()[:3],
        GROUP=heads // kv_heads, HAS_TIME=time is not None, HAS_LENGTHS=lengths is not None, D0=d0, D1=d1,
        BM=launch.block_m, BN=launch.block_n,
        UPCAST=upcast(q), num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
    return out


def _check(
    q: Tensor,
    condition: tuple[Tensor, Tensor],
    time: tuple[Tensor, Tensor] | None,
    image: tuple[Tensor, Tensor] | None,
    lengths: Tensor | None,
) -> None:
    batch, heads, _, head_dim = q.shape
    prefixes, kv_heads = condition[0].shape[:2]
    if heads % kv_heads or batch % prefixes:
        raise ValueError(f"{heads} query heads over {kv_heads} key heads, {batch} rows over {prefixes} prefixes")
    for name, pair, rows in (("condition", condition, prefixes), ("time", time, prefixes), ("image", image, batch)):
        for t in pair or ():
            if t.shape[0] != rows or t.shape[1] != kv_heads or t.shape[-1] != head_dim:
                raise ValueError(
                    f"{name}: shape {tuple(t.shape)} does not fit {rows} rows of {kv_heads} heads of {head_dim}"
                )
            if t.stride(-1) != 1 or t.dtype != q.dtype:
                raise ValueError(f"{name}: expected a contiguous last axis and dtype {q.dtype}, found {t.dtype}")
    if q.stride(-1) != 1:
        raise ValueError("q: expected a contiguous last axis")
    if lengths is not None and (lengths.shape != (prefixes,) or lengths.dtype != torch.int32):
        raise ValueError(f"lengths: expected int32 ({prefixes},), found {lengths.dtype} {tuple(lengths.shape)}")


def specs(sm: int, dtype: str, head_dim: int = 96, group: int = 1) -> Iterator[Spec]:
    """What `kernels.aot` compiles: the decoder's attention, with the time token and (first step's quirk) without."""
    launch = for_width(for_sm(LAUNCHES, sm), dtype == "fp32")
    d0, d1 = split_head(head_dim)
    for has_time in (True, False):
        yield make_spec(
            f"segment_attention_{head_dim}" + ("" if has_time else "_condition"),
            segment_kernel,
            {**pointers(segment_kernel, dtype, lengths="i32"), "scale": "fp32"},
            dict(
                GROUP=group,
                HAS_TIME=has_time,
                HAS_LENGTHS=True,
                D0=d0,
                D1=d1,
                BM=launch.block_m,
                BN=launch.block_n,
                UPCAST=False,
            ),
            launch.warps,
            launch.stages,
            unaligned=("queries", "images", "capacity", "heads", "share"),
        )
