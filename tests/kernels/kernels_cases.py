"""Random arguments of the attention kernels, in float64."""

from __future__ import annotations

import torch


def attention_case(queries, images, capacity, lengths, head_dim, heads, kv_heads, time=True, seed=0):
    """Keyword arguments of `segment_attention`: one prefix for each row."""
    g = torch.Generator().manual_seed(seed)
    batch = len(lengths)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return dict(
        q=draw(batch, heads, queries, head_dim),
        condition=(draw(batch, kv_heads, capacity, head_dim), draw(batch, kv_heads, capacity, head_dim)),
        time=(draw(batch, kv_heads, head_dim), draw(batch, kv_heads, head_dim)) if time else None,
        image=(draw(batch, kv_heads, images, head_dim), draw(batch, kv_heads, images, head_dim)) if images else None,
        lengths=torch.tensor(lengths, dtype=torch.int32),
    )
