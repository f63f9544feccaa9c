"""Times of the sampler and its arithmetic: t runs from 0 (noise) to 1 (image)."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from .errors import BadRequestError

A = TypeVar("A")


def timesteps(steps: int, shift: float = 1.0) -> NDArray[np.float64]:
    """steps + 1 times from 0 to 1; shift s maps t to t / (t + s - s·t), slower at the start for s > 1."""
    if steps < 1:
        raise BadRequestError(f"num_inference_steps = {steps}: expected at least 1")
    if shift <= 0:
        raise BadRequestError(f"shift = {shift}: expected a positive number")
    t = np.linspace(0, 1, steps + 1)
    return t / (t + shift - shift * t)


def guide(guided: A, unguided: A, scale: float) -> A:
    """Classifier-free guidance: unguided + scale · (guided - unguided)."""
    return unguided + scale * (guided - unguided)  # type: ignore[operator, no-any-return]
