"""Attention of a few new tokens over a static cache, split over the sequence so that one token fills the GPU.

Decoding is one query a head: a program for each (split, row, key head) reads its share of the cache once for all query
heads of the group, and a second kernel joins the partial softmaxes. The number of tokens in the cache is read on the
device, so a captured graph serves every position. Several new tokens (a guess being verified) are causal among
themselves.

Axes: B batch, Hq query heads, Hkv key heads, S new tokens, C cache capacity, D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .dependent import begin, dependent, launch_options
from .launch import Launch, for_sm, for_width, sm_of, upcast, use_triton
from .segment_attention import LOG2_E
from .spec import Spec, make_spec, pointers
from .triton_compat import tl, triton

# block_m is the least that a matrix product takes; block_n keys are in flight at once. None is measured yet.
LAUNCHES = {
    75: Launch(block_m=16, block_n=32, warps=4, stages=2),
    80: Launch(block_m=16, block_n=64, warps=4, stages=3),
    87: Launch(block_m=16, block_n=64, warps=4, stages=2),
    89: Launch(block_m=16, block_n=64, warps=4, stages=3),
    90: Launch(block_m=16, block_n=64, warps=4, stages=4),
    120: Launch(block_m=16, block_n=64, warps=4, stages=3),
}
SPLITS = 32
MOST_TOKENS = 32  # new tokens at once; more belong in an ordinary attention
TURING_ROWS = 64  # queries of a group beside keys and values in the 64 KiB that a block has before SM 80


@triton.jit
def partial_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    length_ptr: tl.tensor,
    part_ptr: tl.tensor,
    stats_ptr: tl.tensor,
    scale: tl.tensor,
    tokens: tl.tensor,
    kv_heads: tl.tensor,
    q_b: tl.tensor,
    q_h: tl.tensor,
    q_n: tl.tensor,
    k_b: tl.tensor,
    k_h: tl.tensor,
    k_n: tl.tensor,
    v_b: tl.tensor,
    v_h: tl.tensor,
    v_n: tl.tensor,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SPLITS: tl.constexpr,
    UPCAST: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Writes part (B·Hkv, SPLITS, GROUP·S, D) float32 and stats (…, 2): running maximum (base 2) and sum.

    Splits past the length at hand do nothing.
    """
    begin(PDL)
    split = tl.program_id(0)
    index = tl.program_id(1).to(tl.int64)
    batch, kv_head = index // kv_heads, index % kv_heads
    length = tl.load(length_ptr)
    blocks = (length + BN - 1) // BN
    each = (blocks + SPLITS - 1) // SPLITS
    first = split * each * BN
    last = tl.minimum(first + each * BN, length)

    rows = tl.arange(0, BM)
    real = rows < GROUP * tokens
    head, token = kv_head * GROUP + rows // tokens, rows % tokens
    if first >= length:
        return
    d = tl.arange(0, D)
    columns = tl.arange(0, BN)
    q_rows = q_ptr + batch * q_b + head * q_h + token * q_n
    q = tl.load(q_rows[:, None] + d[None, :], mask=real[:, None], other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    acc = tl.zeros([BM, D], dtype=tl.float32)
    top = tl.full([BM], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BM], dtype=tl.float32)
    visible = length - tokens + token  # the last key that a row may see
    k_rows = k_ptr + batch * k_b + kv_head * k_h
    v_rows = v_ptr + batch * v_b + kv_head * v_h
    for start in range(first, last, BN):
        n = start + columns
        keep = n < length
        k = tl.load(k_rows + n[None, :] * k_n + d[:, None], mask=keep[None, :], other=0.0)
        v = tl.load(v_rows + n[:, None] * v_n + d[None, :], mask=keep[:, None], other=0.0)
        if UPCAST:
            k, v = k.to(tl.float32), v.to(tl.float32)
        scores = tl.dot(q, k, input_precision="ieee") * scale
        scores = tl.where(n[None, :] <= visible[:, None], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        # A row may see nothing of this block (a later guess's keys): keep −inf − −inf from becoming a NaN.
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        shrink = tl.exp2(top - safe)
        p = tl.exp2(scores - safe[:, None])
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = new_top
    place = (index * SPLITS + split) * GROUP * tokens + rows
    tl.store(part_ptr + place[:, None] * D + d[None, :], acc, mask=real[:, None])
    tl.store(stats_ptr + place * 2, top, mask=real)
    tl.store(stats_ptr + place * 2 + 1, total, mask=real)


@triton.jit
def join_kernel(
    part_ptr: tl.tensor,
    stats_ptr: tl.tensor,
    o_ptr: tl.tensor,
    length_ptr: tl.tensor,
    tokens: tl.tensor,
    kv_heads: tl.tensor,
    o_b: tl.tensor,
    o_h: tl.tensor,
    o_n: tl.tensor,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BN: tl.constexpr,
    SPLITS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    begin(PDL)
    blocks = (tl.load(length_ptr) + BN - 1) // BN
    each = (blocks + SPLITS - 1) // SPLITS
    row = tl.program_id(0)
    index = tl.program_id(1).to(tl.int64)
    batch, kv_head = index // kv_heads, index % kv_heads
    splits, d = tl.arange(0, SPLITS), tl.arange(0, D)
    place = (index * SPLITS + splits) * GROUP * tokens + row
    used = splits * each < blocks
    top = tl.load(stats_ptr + place * 2, mask=used, other=float("-inf"))
    total = tl.load(stats_ptr + place * 2 + 1, mask=used, other=0.0)
    weight = tl.exp2(top - tl.max(top, 0))
    part = tl.load(part_ptr + place[:, None] * D + d[None, :], mask=used[:, None], other=0.0)
    out = tl.sum(part * weight[:, None], 0) / tl.sum(total * weight, 0)
    head, token = kv_head * GROUP + row // tokens, row % tokens
    tl.store(o_ptr + batch * o_b + head * o_h + token * o_n + d, out.to(o_ptr.dtype.element_ty))


def decode_attention_torch(q: Tensor, keys: Tensor, values: Tensor, length: Tensor) -> Tensor:
    """Reference implementation of `decode_attention`: the whole capacity under a mask, nothing is read by the host."""
    tokens, group = q.shape[2], q.shape[1] // keys.shape[1]
    place = torch.arange(keys.shape[2], device=q.device)
    visible = length - tokens + torch.arange(tokens, device=q.device)
    keep = place <= visible[:, None]
    k, v = (t.repeat_interleave(group, 1) for t in (keys, values))
    scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~keep, float("-inf"))
    return scores.softmax(-1) @ v


def most_splits(capacity: int, block: int) -> int:
    """As many as a full cache has blocks, up to `SPLITS`: a short cache needs fewer programs and fewer partial sums."""
    return min(triton.next_power_of_2(triton.cdiv(capacity, block)), SPLITS)


def decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    impl: str = "auto",
    launch: Launch | None = None,
    splits: int | None = None,
) -> Tensor:
    """Attention of the cache's last S tokens, causal among themselves.

    q (B, Hq, S, D), S up to 32 over a group; keys, values (B, Hkv, C, D), the new tokens' already written; length
    int32 (1,) on the device: tokens in the cache, the new ones included. Any strides with a contiguous D, a power of
    two of 16 or more. splits: programs that share the cache of a row and head, a power of two; None goes by the
    capacity. Returns (B, Hq, S, D) stored as (B, S, Hq, D). Raises ValueError for shapes that do not fit.
    """
    batch, heads, tokens, head_dim = q.shape
    kv_heads = keys.shape[1]
    if heads % kv_heads or keys.shape != values.shape or keys.shape[0] != batch or keys.shape[3] != head_dim:
        raise ValueError(f"q {tuple(q.shape)} does not fit a cache of {tuple(keys.shape)}, {tuple(values.shape)}")
    if length.shape != (1,) or length.dtype != torch.int32:
        raise ValueError(f"length: expected int32 (1,), found {length.dtype} {tuple(length.shape)}")
    good = head_dim >= 16 and head_dim & (head_dim - 1) == 0 and tokens <= MOST_TOKENS
    need = f"head_dim {head_dim} is not a power of two of 16 or more, or {tokens} tokens exceed {MOST_TOKENS}"
    if 0 < sm_of(q) < 80 and heads // kv_heads * tokens > TURING_ROWS:
        good, need = False, f"{heads // kv_heads * tokens} queries of a group exceed the {TURING_ROWS} of SM {sm_of(q)}"
    if not use_triton(impl, q, good, need):
        return decode_attention_torch(q, keys, values, length)
    if any(t.stride(-1) != 1 or t.dtype != q.dtype for t in (q, keys, values)):
        raise ValueError("q, keys and values need one dtype and a contiguous last axis")
    launch = launch or for_width(for_sm(LAUNCHES, sm_of(q)), q.dtype == torch.float32)
    splits = splits or most_splits(keys.shape[2], launch.block_n)
    pdl = dependent(sm_of(q))
    group, rows = heads // kv_heads, heads // kv_heads * tokens
    part = torch.empty(batch * kv_heads, splits, rows, head_dim, dtype=torch.float32, device=q.device)
    stats = torch.empty(batch * kv_heads, splits, rows, 2, dtype=torch.float32, device=q.device)
    out = q.new_empty(batch, tokens, heads, head_dim).transpose(1, 2)
    partial_kernel[splits, batch * kv_heads](
        q, keys, values, length, part, stats, head_dim**-0.5 * LOG2_E, tokens, kv_heads,
        *q.stride()[:3], *keys.stride()[:3], *values.stride()[:3],
        GROUP=group, D=head_dim, BM=max(launch.block_m, triton.next_power_of_2(rows)), BN=launch.block_n,
        SPLITS=splits, UPCAST=upcast(q), PDL=pdl,
        num_warps=launch.warps, num_stages=launch.stages, **launch_options(pdl),
    )  # fmt: skip
    join_kernel[rows, batch * kv_heads](
        part, stats, out, length, tokens, kv_heads, *out.stride()[:3],
        GROUP=group, D=head_dim, BN=launch.block_n, SPLITS=splits, PDL=pdl, num_warps=4, **launch_options(pdl),
    )  # fmt: skip
    return out


def specs(sm: int, dtype: str, head_dim: int = 128, group: int = 7) -> Iterator[Spec]:
    """What `kernels.aot` compiles: the language model's decoding, one token and a guess of eight."""
    launch = for_width(for_sm(LAUNCHES, sm), dtype == "fp32")
    types = pointers(partial_kernel, dtype, length="i32", part="fp32", stats="fp32")
    for name, block in (("", launch.block_m), ("_guess", 64)):
        yield make_spec(
            f"decode_attention_{head_dim}{name}",
            partial_kernel,
            {**types, "scale": "fp32"},
            dict(GROUP=group, D=head_dim, BM=block, BN=launch.block_n, SPLITS=SPLITS, UPCAST=False, PDL=dependent(sm)),
            launch.warps,
            launch.stages,
            unaligned=("tokens", "kv_heads"),
        )
    yield make_spec(
        f"decode_attention_{head_dim}_join",
        join_kernel,
        pointers(join_kernel, "fp32", o=dtype, length="i32"),
        dict(GROUP=group, D=head_dim, BN=launch.block_n, SPLITS=SPLITS, PDL=dependent(sm)),
        4,
        1,
        unaligned=("tokens", "kv_heads"),
    )
