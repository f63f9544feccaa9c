"""Large images through the VAE in overlapping tiles, blended on the host: what `model.vae` does, in numpy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
_OVERLAP = 0.25


def tiled(run: Callable[[Floats], Floats], x: Floats, tile: int, unit: int = 1) -> Floats:
    """run over x (1, C, H, W) in tiles of at most `tile` units a side (a unit is `unit` places), blended linearly.

    What fits one tile goes through whole. run may scale the sides by any one factor.
    """
    height, width = x.shape[-2] // unit, x.shape[-1] // unit
    if max(height, width) <= tile:
        return run(x)
    overlap = max(1, int(tile * _OVERLAP))
    out = weight = np.zeros(0, np.float32)
    for top in _starts(height, tile, overlap):
        for left in _starts(width, tile, overlap):
            bottom, right = min(top + tile, height), min(left + tile, width)
            part = run(np.ascontiguousarray(x[..., top * unit : bottom * unit, left * unit : right * unit]))
            step = part.shape[-2] // (bottom - top)  # output places a unit
            if not out.size:
                out = np.zeros((*part.shape[:2], height * step, width * step), np.float32)
                weight = np.zeros((height * step, width * step), np.float32)
            ramp = _ramp(top, bottom, height, overlap, step)[:, None] * _ramp(left, right, width, overlap, step)
            rows, columns = slice(top * step, bottom * step), slice(left * step, right * step)
            out[..., rows, columns] += part * ramp
            weight[rows, columns] += ramp
    return out / weight


def _starts(size: int, tile: int, overlap: int) -> list[int]:
    if size <= tile:
        return [0]
    count = -(-(size - overlap) // (tile - overlap))
    return [round(i * (size - tile) / (count - 1)) for i in range(count)]


def _ramp(start: int, end: int, size: int, overlap: int, step: int) -> Floats:
    length, slope = (end - start) * step, overlap * step
    place = np.arange(length, dtype=np.float32) + np.float32(0.5)
    ramp = np.ones(length, np.float32)
    if start > 0:
        ramp = np.minimum(ramp, place / np.float32(slope))
    if end < size:
        ramp = np.minimum(ramp, (np.float32(length) - place) / np.float32(slope))
    return ramp
