"""Times of the sampler and its arithmetic: t runs from 0 (noise) to 1 (image)."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..errors import BadRequestError

A = TypeVar("A")
SOLVERS = ("euler", "multistep")


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


def within(time: float, interval: tuple[float, float]) -> bool:
    """Whether a step that begins at `time` is guided: interval [start, end), or up to the end for end = 1."""
    return interval[0] <= time < interval[1] or (interval[1] >= 1 and time >= interval[0])


class Solver:
    """Turns velocities into moves. "euler": the velocity itself, first order. "multistep": Adams-Bashforth of second
    order with steps of any length, (1 + r/2) v - (r/2) v_before with r = h / h_before; its first step is Euler's."""

    def __init__(self, kind: str = "euler") -> None:
        if kind not in SOLVERS:
            raise BadRequestError(f"solver {kind!r}: expected one of {', '.join(SOLVERS)}")
        self.kind = kind
        self._before: tuple[Any, float] | None = None

    def forget(self) -> None:
        """The velocity is about to jump (guidance begins or ends): the next step is Euler's."""
        self._before = None

    def direction(self, velocity: A, length: float) -> A:
        """What to add, times `length`, to the latents. Keeps a copy of the velocity, whose memory may be reused."""
        if self.kind == "euler":
            return velocity
        before = self._before
        self._before = (velocity + 0, length)  # type: ignore[operator]
        if before is None:
            return velocity
        share = length / before[1] / 2
        return (1 + share) * velocity - share * before[0]  # type: ignore[operator, no-any-return]
