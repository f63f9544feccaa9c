"""Scenes, their pictures, and the exact verifier.

A picture has 96x96 pixels: 36 image tokens of 16 pixels, 9 vision tokens of 28 (after the resize to 84). Each of the
3x3 cells covers 2x2 image tokens. Arrangements are those of a die: with free places, counting took a small model
an order of magnitude more samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

SIDE, CELL = 96, 32
COUNTS = (1, 2, 3, 4, 5, 6)
COLOURS = {"red": (200, 40, 40), "green": (30, 140, 60), "blue": (40, 80, 200), "yellow": (220, 190, 30)}
SHAPES = ("circle", "square", "triangle", "cross")
_PLACES = {1: (4,), 2: (0, 8), 3: (0, 4, 8), 4: (0, 2, 6, 8), 5: (0, 2, 4, 6, 8), 6: (0, 2, 3, 5, 6, 8)}
BRIGHTNESS = (-2, -1, 0, 1, 2)  # steps of 4 %; few, so that latents of pictures can be cached
_TOLERANCE = 0.12  # mean absolute error of a cell against its template, in [0, 1]
_MARGIN = 0.02  # by which the best template must beat the second


@dataclass(frozen=True, order=True)
class Scene:
    """count things of one colour and one shape."""

    count: int
    colour: str
    shape: str

    def __post_init__(self) -> None:
        if self.count not in COUNTS or self.colour not in COLOURS or self.shape not in SHAPES:
            raise ValueError(
                f"{self}: expected a count of 1 to 6, a colour of {', '.join(COLOURS)}, a shape of {', '.join(SHAPES)}"
            )

    @property
    def held_out(self) -> bool:
        """A fifth of all scenes: never asked for in reinforcement learning, and what evaluation asks for."""
        index = list(COLOURS).index(self.colour) + SHAPES.index(self.shape)
        return (self.count + 2 * index) % 5 == 0


def all_scenes() -> list[Scene]:
    """All 96, in order."""
    return [Scene(n, c, s) for n in COUNTS for c in COLOURS for s in SHAPES]


@lru_cache(maxsize=1024)
def render(scene: Scene, brightness: int = 0) -> Image.Image:
    """The picture, in one of five BRIGHTNESS steps. The image is shared: do not draw on it."""
    colour = tuple(min(255, round(v * (1 + 0.04 * brightness))) for v in COLOURS[scene.colour])
    scale = 4  # drawn large and reduced, for smooth edges
    picture = Image.new("RGB", (SIDE * scale, SIDE * scale), (255, 255, 255))
    pen = ImageDraw.Draw(picture)
    for place in _PLACES[scene.count]:
        top, left = place // 3 * CELL * scale, place % 3 * CELL * scale
        _shape(pen, scene.shape, left + 4 * scale, top + 4 * scale, 24 * scale, colour)
    return picture.resize((SIDE, SIDE), Image.Resampling.BOX)


def _shape(pen: ImageDraw.ImageDraw, shape: str, x: int, y: int, size: int, colour: tuple[int, ...]) -> None:
    box = (x, y, x + size, y + size)
    third = size // 3
    if shape == "circle":
        pen.ellipse(box, fill=colour)
    elif shape == "square":
        pen.rectangle(box, fill=colour)
    elif shape == "triangle":
        pen.polygon([(x + size // 2, y), (x, y + size), (x + size, y + size)], fill=colour)
    else:
        pen.rectangle((x + third, y, x + 2 * third, y + size), fill=colour)
        pen.rectangle((x, y + third, x + size, y + 2 * third), fill=colour)


def _templates() -> tuple[NDArray[np.float32], list[tuple[str, str] | None]]:
    """(17, 32, 32, 3): an empty cell, then every colour and shape."""
    cells: list[NDArray[np.float32]] = [np.ones((CELL, CELL, 3), dtype=np.float32)]
    names: list[tuple[str, str] | None] = [None]
    for colour in COLOURS:
        for shape in SHAPES:
            pixels = np.asarray(render(Scene(1, colour, shape)), np.float32) / np.float32(255)
            cells.append(pixels[CELL : 2 * CELL, CELL : 2 * CELL].astype(np.float32))
            names.append((colour, shape))
    return np.stack(cells), names


def verify(image: Image.Image | NDArray[np.float32]) -> Scene | None:
    """The scene that a picture shows, or None: every cell must clearly be one template, the places those of a die.

    image: (96, 96, 3), floats in [0, 1] or a PIL image. For evaluation only; it is never a reward.
    """
    pixels = np.asarray(image, np.float32) / (255 if isinstance(image, Image.Image) else 1)
    if pixels.shape != (SIDE, SIDE, 3) or not np.isfinite(pixels).all():
        return None
    templates, names = _TEMPLATES
    cells = pixels.reshape(3, CELL, 3, CELL, 3).transpose(0, 2, 1, 3, 4).reshape(9, 1, CELL, CELL, 3)
    errors = np.abs(cells - templates[None]).mean(axis=(2, 3, 4))
    order = np.sort(errors, axis=1)
    if (order[:, 0] > _TOLERANCE).any() or (order[:, 1] - order[:, 0] < _MARGIN).any():
        return None
    found = [names[i] for i in errors.argmin(axis=1)]
    things = {name for name in found if name is not None}
    filled = tuple(i for i, name in enumerate(found) if name is not None)
    if len(things) != 1 or filled not in _PLACES.values():
        return None
    ((colour, shape),) = things
    return Scene(len(filled), colour, shape)


_TEMPLATES = _templates()
