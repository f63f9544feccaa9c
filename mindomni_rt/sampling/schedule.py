"""Times of the sampler and its arithmetic: t runs from 0 (noise) to 1 (image)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

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
    """Weights of the velocities in a step of length h. "euler", first order: h. "multistep", Adams-Bashforth of second
    order with steps of any length: h (1 + r/2) for this velocity and -h r/2 for the one before, r = h / h_before; its
    first step is Euler's. Raises BadRequestError for another name."""

    def __init__(self, kind: str = "euler") -> None:
        if kind not in SOLVERS:
            raise BadRequestError(f"solver {kind!r}: expected one of {', '.join(SOLVERS)}")
        self.kind = kind
        self._before: float | None = None

    def forget(self) -> None:
        """The velocity is about to jump (guidance begins or ends): the next step is Euler's."""
        self._before = None

    def weights(self, length: float) -> tuple[float, float]:
        """Weights of this step's velocity and of the previous one, for a step of a length."""
        before, self._before = self._before, length if self.kind == "multistep" else None
        if before is None:
            return length, 0.0
        share = length / before / 2
        return length * (1 + share), -length * share


@dataclass(frozen=True)
class Step:
    """One step of a denoising loop, decided ahead of it.

    branches: how many prefixes compute a velocity; with two, scale combines them (`guide`). The latents move by
    weight · velocity + previous_weight · (the previous step's combined velocity). outlook: the time that is left after
    the step. condition_only: image tokens see the condition alone, as in the released code's first step.
    """

    index: int
    branches: int
    scale: float
    weight: float
    previous_weight: float
    outlook: float
    condition_only: bool = False


def plan_steps(
    times: NDArray[np.float64],
    branches: int = 2,
    guidance_scale: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    solver: str = "euler",
    first_step: str = "full",
) -> list[Step]:
    """The steps between `times` (steps + 1,). Outside of the interval the first branch runs alone."""
    weights, steps = Solver(solver), list[Step]()
    for index, (now, following) in enumerate(pairwise(map(float, times))):
        count = branches if within(now, guidance_interval) else 1
        if steps and count != steps[-1].branches:
            weights.forget()
        quirk = index == 0 and first_step == "condition_only"
        steps.append(Step(index, count, guidance_scale, *weights.weights(following - now), 1 - following, quirk))
    return steps
