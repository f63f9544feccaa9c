"""Products with packed weights, unpacked a part at a time: what is unpacked at once has a bound, which plans count."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.nn import functional as F

UNPACKED = 64_000_000
"""Bytes of unpacked weights at once, copies made on the way included."""


def unpacked_rows(width: int, element: int) -> int:
    """Rows of a weight (N, width) to unpack at once, where unpacking takes `element` bytes a number."""
    return max(UNPACKED // (width * element), 1)


def by_parts(
    x: Tensor,
    outputs: int,
    rows: int,
    tensors: Sequence[Tensor],
    unpack: Callable[..., Tensor],
    bias: Tensor | None,
) -> Tensor:
    """x (…, K) times a weight (outputs, K) transposed, `rows` of it at a time, made by `unpack` of their tensors."""
    if rows >= outputs:
        out = F.linear(x, unpack(*tensors))
    else:
        out = x.new_empty(*x.shape[:-1], outputs)
        for first in range(0, outputs, rows):
            place = slice(first, first + rows)
            out[..., place] = F.linear(x, unpack(*(t[place] for t in tensors)))
    return out if bias is None else out + bias
