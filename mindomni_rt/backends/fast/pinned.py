"""Host copies of tensors in a few large blocks. torch rounds each pinned block up to a power of two, so blocks are that
from the start and are filled with many tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

LARGEST = 1 << 30  # a block, unless a tensor is larger; the copies of one block exist twice while it is filled
ALIGN = 64


def pack(sizes: Sequence[int]) -> list[tuple[int, dict[int, int]]]:
    """Blocks for tensors of these sizes in bytes: (size of the block, offset of each tensor in it by index).

    Largest first, each into the first block with room. A new block is no larger than what is left to place, rounded
    down, unless its first tensor is.
    """
    left = sum(_aligned(size) for size in sizes)
    blocks: list[tuple[int, dict[int, int]]] = []
    used: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        size = _aligned(sizes[index])
        at = next((i for i, (room, _) in enumerate(blocks) if used[i] + size <= room), len(blocks))
        if at == len(blocks):
            blocks.append((max(_power_of_two(size), min(LARGEST, 1 << (left.bit_length() - 1))), {}))
            used.append(0)
        blocks[at][1][index] = used[at]
        used[at] += size
        left -= size
    return blocks


def _aligned(size: int) -> int:
    return -(-max(size, 1) // ALIGN) * ALIGN


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def pinned(tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """(tensor, its copy in pinned memory), of the same strides, block by block: a caller that lets go of what it was
    given needs little more than the copies."""
    for room, places in pack([t.numel() * t.element_size() for t in tensors]):
        block = torch.empty(room, dtype=torch.uint8, pin_memory=True)
        for index, at in places.items():
            yield tensors[index], _copy(tensors[index], block, at)


def _copy(tensor: Tensor, block: Tensor, at: int) -> Tensor:
    data = tensor.detach()
    strides = torch.empty_like(data, device="meta").stride()  # contiguous unless the tensor is dense
    flat = block[at : at + data.numel() * data.element_size()].view(data.dtype)
    return flat.as_strided(data.shape, strides).copy_(data, non_blocking=True)
