"""Large images through the VAE in overlapping tiles, blended linearly; for numpy arrays and torch tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..errors import BadRequestError

A = TypeVar("A", bound=Any)
_OVERLAP = 0.25


def host_array(array: NDArray[np.float32], like: Any) -> Any:
    """The default `place`: numpy arrays stay on the host."""
    return array.astype(like.dtype, copy=False)


def tiled(
    run: Callable[[A], A],
    x: A,
    tile: int,
    unit: int = 1,
    place: Callable[[NDArray[np.float32], A], A] = host_array,
) -> A:
    """`run` over x (B, C, H, W) in tiles of at most `tile` units a side (a unit is `unit` places), blended linearly.

    What fits one tile is run whole. Only the output and one tile live at a time. `run` may scale the sides by any one
    factor. place: makes an array of the kind, type and device of its second argument. Raises BadRequestError for a tile
    below 2 and for sides that are no multiples of the unit.
    """
    if tile < 2:
        raise BadRequestError(f"tile = {tile}: expected at least 2 latents a side, or None for no tiles")
    if x.shape[-2] % unit or x.shape[-1] % unit:
        raise BadRequestError(f"image of {x.shape[-1]}x{x.shape[-2]} pixels: sides must be multiples of {unit}")
    height, width = x.shape[-2] // unit, x.shape[-1] // unit
    if max(height, width) <= tile:
        return run(x)
    overlap = max(1, int(tile * _OVERLAP))
    out: Any = None
    for top in _starts(height, tile, overlap):
        for left in _starts(width, tile, overlap):
            bottom, right = min(top + tile, height), min(left + tile, width)
            part = run(x[..., top * unit : bottom * unit, left * unit : right * unit])
            step = part.shape[-2] // (bottom - top)  # output places a unit
            if out is None:
                out = place(np.zeros((*part.shape[:2], height * step, width * step), np.float32), part)
                weight = place(np.zeros((height * step, width * step), np.float32), part)
            sides = _ramp(top, bottom, height, overlap, step)[:, None] * _ramp(left, right, width, overlap, step)
            ramp = place(sides, part)
            rows, columns = slice(top * step, bottom * step), slice(left * step, right * step)
            out[..., rows, columns] += part * ramp
            weight[rows, columns] += ramp
    return out / weight  # type: ignore[no-any-return]


def _starts(size: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin: evenly spread, so that none is a sliver."""
    if size <= tile:
        return [0]
    count = -(-(size - overlap) // (tile - overlap))
    return [round(i * (size - tile) / (count - 1)) for i in range(count)]


def _ramp(start: int, end: int, size: int, overlap: int, step: int) -> NDArray[np.float32]:
    """Weights along one side of a tile: rising and falling over the overlap, but not at the image's own edges."""
    length, slope = (end - start) * step, np.float32(overlap * step)
    place = np.arange(length, dtype=np.float32) + np.float32(0.5)
    ramp = np.ones(length, np.float32)
    if start > 0:
        ramp = np.minimum(ramp, place / slope)
    if end < size:
        ramp = np.minimum(ramp, (np.float32(length) - place) / slope)
    return ramp
