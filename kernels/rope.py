"""Rotary embedding of a fused projection [q | k | v], in place or into a static cache.

Splitting is by stride: q, k and v are views of the projection's own memory, so the split costs nothing and only q and
k are touched. With a cache, k and v are written to their slot; the slot is read on the device (captured graphs).
Rotate-half convention: channel i pairs with i + D/2.

Axes: B batch, S tokens, Hq query heads, Hkv key heads, C cache capacity, D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .launch import use_triton
from .spec import Spec, make_spec, pointers
from .triton_compat import tl, triton

HEADS = 8  # heads of a program; they share one row of the tables


@triton.jit
def rope_kernel(
    x_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    keys_ptr: tl.tensor,
    values_ptr: tl.tensor,
    start_ptr: tl.tensor,
    tokens: tl.tensor,
    q_heads: tl.tensor,
    kv_heads: tl.tensor,
    table_b: tl.tensor,
    cache_b: tl.tensor,
    cache_h: tl.tensor,
    cache_n: tl.tensor,
    CACHE: tl.constexpr,
    HALF: tl.constexpr,
    PADDED: tl.constexpr,
    HEADS: tl.constexpr,
) -> None:
    place = tl.program_id(0).to(tl.int64)
    batch, token = place // tokens, place % tokens
    slot = token
    if CACHE:
        slot = token + tl.load(start_ptr)
    i = tl.arange(0, PADDED)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    row = place * (q_heads + 2 * kv_heads) * 2 * HALF
    table = batch * table_b + slot * HALF + i
    cos = tl.load(cos_ptr + table, mask=i < HALF, other=0.0)[None, :]
    sin = tl.load(sin_ptr + table, mask=i < HALF, other=0.0)[None, :]
    inside = (i < HALF)[None, :]
    turned = (head < q_heads + kv_heads)[:, None] & inside
    at = row + head[:, None] * 2 * HALF + i[None, :]
    first = tl.load(x_ptr + at, mask=turned, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + at + HALF, mask=turned, other=0.0).to(tl.float32)
    low = (first * cos - second * sin).to(x_ptr.dtype.element_ty)
    high = (second * cos + first * sin).to(x_ptr.dtype.element_ty)
    if CACHE:
        is_q = (head < q_heads)[:, None] & inside
        tl.store(x_ptr + at, low, mask=is_q)
        tl.store(x_ptr + at + HALF, high, mask=is_q)
        is_k = (head >= q_heads)[:, None] & turned
        kv = batch * cache_b + slot * cache_n + i[None, :]
        to = kv + (head - q_heads)[:, None] * cache_h
        tl.store(keys_ptr + to, low, mask=is_k)
        tl.store(keys_ptr + to + HALF, high, mask=is_k)
        v_head = head - q_heads - kv_heads
        is_v = ((v_head >= 0) & (v_head < kv_heads))[:, None] & inside
        to = kv + v_head[:, None] * cache_h
        tl.store(values_ptr + to, tl.load(x_ptr + at, mask=is_v, other=0.0), mask=is_v)
        tl.store(values_ptr + to + HALF, tl.load(x_ptr + at + HALF, mask=is_v, other=0.0), mask=is_v)
    else:
        tl.store(x_ptr + at, low, mask=turned)
        tl.store(x_ptr + at + HALF, high, mask=turned)


def split_heads(x: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, S, (Hq + 2 Hkv) D) -> views q (B, Hq, S, D), k and v (B, Hkv, S, D)."""
    rows = x.unflatten(-1, (heads + 2 * kv_heads, -1)).transpose(1, 2)
    return rows[:, :heads], rows[:, heads : heads + kv_heads], rows[:, heads + kv_heads :]


def rope_torch(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    kv_heads: int,
    cache: tuple[Tensor, Tensor] | None = None,
    start: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Reference implementation of `rope`, on copies; only the cache is written."""
    q, k, v = split_heads(x, heads, kv_heads)
    tokens = x.shape[1]
    if start is not None:
        slots = start.long() + torch.arange(tokens, device=x.device)
        cos, sin = cos[..., slots, :], sin[..., slots, :]
    cos, sin = (t.unsqueeze(-3).to(x.dtype) for t in (cos, sin))

    def turn(t: Tensor) -> Tensor:
        first, second = t.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    q, k = turn(q), turn(k)
    if cache is not None:
        assert start is not None
        cache[0].index_copy_(2, slots, k)
        cache[1].index_copy_(2, slots, v)
        k, v = cache
    return q, k, v


def rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    kv_heads: int,
    cache: tuple[Tensor, Tensor] | None = None,
    start: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotates q and k of a projection and returns views of them. x may be overwritten.

    x (B, S, (Hq + 2 Hkv) D), contiguous; cos, sin float32 (S, D/2) or (B, S, D/2). Returns q (B, Hq, S, D) and k, v
    (B, Hkv, S, D). With a cache (keys, values, each (B, Hkv, C, D)) and start, int32 (1,) on the device, tables are
    (C, D/2), token s takes slot start + s of tables and cache, and k, v are the cache itself.
    Raises ValueError when only one of cache and start is given.
    """
    if (cache is None) != (start is None):
        raise ValueError("cache and start belong together")
    if not use_triton(impl, x):
        return rope_torch(x, cos, sin, heads, kv_heads, cache, start)
    batch, tokens, width = x.shape
    half = width // (heads + 2 * kv_heads) // 2
    assert x.is_contiguous() and cos.is_contiguous() and sin.is_contiguous() and cos.dtype == torch.float32
    keys, values = cache or (x, x)
    if cache:
        assert keys.stride() == values.stride() and keys.stride(-1) == 1
    touched = heads + (2 if cache else 1) * kv_heads
    rope_kernel[batch * tokens, triton.cdiv(touched, HEADS)](
        x, cos, sin, keys, values, x if start is None else start, tokens, heads, kv_heads,
        cos.stride(0) if cos.ndim == 3 else 0, *(keys.stride()[:3] if cache else (0, 0, 0)),
        CACHE=cache is not None, HALF=half, PADDED=triton.next_power_of_2(half), HEADS=HEADS, num_warps=4,
    )  # fmt: skip
    q, k, v = split_heads(x, heads, kv_heads)
    return (q, keys, values) if cache else (q, k, v)


def specs(sm: int, dtype: str) -> Iterator[Spec]:
    """What `kernels.aot` compiles: in place for the decoder's heads of 96, into the cache for the language's of 128."""
    for head_dim, cache in ((96, False), (128, True)):
        yield make_spec(
            f"rope_{head_dim}" + ("_cache" if cache else ""),
            rope_kernel,
            pointers(rope_kernel, dtype, cos="fp32", sin="fp32", start="i32"),
            dict(CACHE=cache, HALF=head_dim // 2, PADDED=triton.next_power_of_2(head_dim // 2), HEADS=HEADS),
            4,
            1,
            unaligned=("tokens", "q_heads", "kv_heads", "table_b", "cache_b", "cache_h", "cache_n"),
        )
