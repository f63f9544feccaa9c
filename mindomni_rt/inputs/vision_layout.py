"""Host-made tables of the vision tower for one image grid: rotary angles and which patches share a window."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..checkpoint.config import VisionConfig
from ..errors import BadRequestError


@dataclass(frozen=True)
class VisionLayout:
    """Tables for N patches in merge order, W windows of S slots.

    cos, sin (N, head_dim / 2) float32; slots (W * S,) int64, the patch in each slot (a spare slot repeats the window's
    first); places (N,) int64, the slot of each patch; mask (W, 1, S, S) bool, True = may attend.
    """

    cos: NDArray[np.float32]
    sin: NDArray[np.float32]
    slots: NDArray[np.int64]
    places: NDArray[np.int64]
    mask: NDArray[np.bool_]

    def arrays(self) -> tuple[NDArray[np.generic], ...]:
        """In the order of `VisionTower.forward`."""
        return self.cos, self.sin, self.slots, self.places, self.mask


def vision_layout(config: VisionConfig, grid: tuple[int, int, int]) -> VisionLayout:
    """Tables for a grid of (1, h, w) patches, h and w multiples of config.merge_size.

    A window covers window_size pixels a side; those at the right and bottom edge may be partial. Raises
    BadRequestError for another grid: MindOmni takes still images, and the layers of full attention see one frame.
    """
    time, height, width = grid
    merge = config.merge_size
    if time != 1 or min(height, width) < 1 or height % merge or width % merge:
        raise BadRequestError(f"patch grid {grid}: expected (1, h, w), h and w positive multiples of {merge}")
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")

    def merge_order(table: NDArray[np.int64]) -> NDArray[np.int64]:
        return table.reshape(height // merge, merge, width // merge, merge).transpose(0, 2, 1, 3).reshape(-1)

    rows, columns = merge_order(rows), merge_order(columns)
    powers = np.float32(10000.0) ** (
        np.arange(0, config.head_dim // 2, 2, dtype=np.float32) / np.float32(config.head_dim // 2)
    )
    inverse = np.float32(1) / powers
    angles = np.concatenate([rows[:, None] * inverse, columns[:, None] * inverse], axis=1).astype(np.float32)

    side = config.window_size // config.patch_size // merge * merge  # patches a side of a window
    across = -(-width // side)
    window = (rows // side) * across + columns // side
    order = np.argsort(window, kind="stable")
    sizes = np.bincount(window)
    first = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    slot = np.arange(side * side)
    filled = slot[None] < sizes[:, None]
    slots = order[first[:, None] + np.where(filled, slot[None], 0)]
    places = np.empty(len(order), np.int64)
    places[order] = (window * side * side)[order] + np.arange(len(order)) - first[window[order]]
    mask = np.broadcast_to(filled[:, None, None, :], (len(sizes), 1, side * side, side * side))
    return VisionLayout(np.cos(angles), np.sin(angles), slots.reshape(-1), places, np.ascontiguousarray(mask))
