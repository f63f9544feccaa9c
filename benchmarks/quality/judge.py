"""The small world's pictures, judged without the code that drew the training data.

A picture of 96x96 pixels holds 3x3 cells; a cell is empty or holds one thing of four colours and four shapes. Templates
are drawn here on their own. `shapes.jsonl` holds riddles that reinforcement learning never asked for.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

COLOURS = {"red": (200, 40, 40), "green": (30, 140, 60), "blue": (40, 80, 200), "yellow": (220, 190, 30)}
SHAPES = ("circle", "square", "triangle", "cross")
RIDDLES = Path(__file__).parent / "shapes.jsonl"
_LEFT, _SIZE, _CELL = 4, 24, 32
_FAR = 0.12  # mean absolute error from which a cell is like no template


@dataclass(frozen=True, kw_only=True)
class Riddle:
    """A request and what its picture must hold."""

    instruction: str
    count: int
    colour: str
    shape: str


def riddles(path: Path = RIDDLES) -> list[Riddle]:
    """The built-in suite."""
    return [Riddle(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines() if line]


def _template(colour: tuple[int, int, int], shape: str) -> NDArray[np.float32]:
    big = 8
    cell = Image.new("RGB", (_CELL * big, _CELL * big), "white")
    pen = ImageDraw.Draw(cell)
    low, high, third = _LEFT * big, (_LEFT + _SIZE) * big, _SIZE * big // 3
    if shape == "circle":
        pen.ellipse((low, low, high, high), fill=colour)
    elif shape == "square":
        pen.rectangle((low, low, high, high), fill=colour)
    elif shape == "triangle":
        pen.polygon([((low + high) // 2, low), (low, high), (high, high)], fill=colour)
    else:
        pen.rectangle((low + third, low, low + 2 * third, high), fill=colour)
        pen.rectangle((low, low + third, high, low + 2 * third), fill=colour)
    return np.asarray(cell.resize((_CELL, _CELL), Image.Resampling.BOX), np.float32) / np.float32(255)


def read(pixels: NDArray[np.float32]) -> tuple[int, str, str] | None:
    """(count, colour, shape) of a picture (96, 96, 3) in [0, 1]; None if a cell is unclear or things differ."""
    if pixels.shape != (3 * _CELL, 3 * _CELL, 3):
        return None
    names = [(c, s) for c in COLOURS for s in SHAPES]
    templates = np.stack([np.ones((_CELL, _CELL, 3), np.float32), *(_template(COLOURS[c], s) for c, s in names)])
    cells = pixels.reshape(3, _CELL, 3, _CELL, 3).swapaxes(1, 2).reshape(9, 1, _CELL, _CELL, 3)
    errors = np.abs(templates - cells).mean(axis=(2, 3, 4))  # (9, templates)
    found = [names[best - 1] for best in errors.argmin(1) if best]
    clear = bool((errors.min(1) < _FAR).all()) and len(set(found)) == 1
    return (len(found), *found[0]) if clear else None


def right(riddle: Riddle, pixels: NDArray[np.float32]) -> bool:
    """Whether a picture holds what a riddle means."""
    return read(pixels) == (riddle.count, riddle.colour, riddle.shape)


def share(asked: Sequence[Riddle], pictures: Sequence[NDArray[np.float32]]) -> float:
    """Share of pictures that are right."""
    return sum(right(r, p) for r, p in zip(asked, pictures, strict=True)) / len(asked)


def psnr(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    """Decibels, for pixels in [0, 1]; equal pictures give 100."""
    error = float(np.mean((found.astype(np.float64) - wanted) ** 2))
    return min(100.0, -10 * np.log10(error)) if error > 0 else 100.0


def likeness(found: Sequence[Any], exact: Sequence[Any]) -> dict[str, float]:
    """Means over the images of results and of the exact ones: PSNR, and cosine of the latents."""
    both = list(zip(found, exact, strict=True))
    images = [psnr(*pair) for a, b in both for pair in zip(a.images, b.images, strict=True)]
    latents = [cosine(*pair) for a, b in both for pair in zip(a.latents, b.latents, strict=True)]
    return {"psnr": round(float(np.mean(images)), 2), "latent_cosine": round(float(np.mean(latents)), 5)}


def cosine(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Of two arrays of one shape."""
    x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    return float(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)))
