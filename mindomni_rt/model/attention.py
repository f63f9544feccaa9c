"""Attention as plain PyTorch. Shapes: q (B, Hq, S, D); k, v (B, Hkv, T, D), Hkv dividing Hq."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""What a block calls: (q, k, v of the new tokens, rotated) -> (B, Hq, S, D)."""
LayerAttend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""What a stage gives a stack of blocks: (layer, q, k, v) -> (B, Hq, S, D)."""


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """Softmax attention scaled by 1/sqrt(D). causal aligns the last query with the last key (as a cache needs).

    mask: boolean (True = may attend) or additive, broadcastable to (B, Hq, S, T).
    """
    queries, keys = q.shape[-2], k.shape[-2]
    if causal and queries > 1 and queries != keys:  # SDPA's own is_causal aligns the first ones
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
        causal = False
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=bool(causal and queries > 1), enable_gqa=q.shape[1] != k.shape[1]
    )


class Workspace:
    """One K and one V buffer, shared by all layers, in which segments stand side by side without concatenation.

    The denoise loop copies the short prefix of a layer in front of the image's keys instead of growing a tensor.
    """

    def __init__(self, batch: int, heads: int, length: int, head_dim: int, like: Tensor) -> None:
        self.keys = like.new_empty(batch, heads, length, head_dim)
        self.values = torch.empty_like(self.keys)

    def gather(self, segments: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Copies the segments (B or 1, H, T_i, D) in order and returns the filled views."""
        at = 0
        for k, v in segments:
            end = at + k.shape[2]
            self.keys[:, :, at:end] = k
            self.values[:, :, at:end] = v
            at = end
        return self.keys[:, :, :at], self.values[:, :, :at]


def segment_attention(
    q: Tensor,
    segments: Sequence[tuple[Tensor, Tensor]],
    workspace: Workspace | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Every query attends to every key of every segment. A segment of batch 1 serves the whole batch.

    mask: boolean over all keys, for batches with padded rows. Without a workspace the segments are concatenated
    (training needs the gradient, export the plain graph).
    """
    if workspace is not None:
        k, v = workspace.gather(segments)
    else:
        batch = q.shape[0]
        k = torch.cat([k.expand(batch, -1, -1, -1) for k, _ in segments], dim=2)
        v = torch.cat([v.expand(batch, -1, -1, -1) for _, v in segments], dim=2)
    return attention(q, k, v, mask)
