"""Solvers and guidance on equations with known solutions."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

from mindomni_rt import BadRequestError
from mindomni_rt.sampling.schedule import Solver, timesteps, within


def solve(kind: str, times: np.ndarray) -> float:
    """x' = x cos 3t from x(0) = 1; x(1) = exp(sin(3) / 3)."""
    solver, x = Solver(kind), np.array(1.0)
    for now, following in pairwise(times):
        velocity = x * np.cos(3 * now)
        x = x + (following - now) * solver.direction(velocity, following - now)
    return abs(float(x) - math.exp(math.sin(3) / 3))


@pytest.mark.parametrize("shift", [1.0, 3.0])  # equal and unequal steps
@pytest.mark.parametrize(("kind", "order"), [("euler", 1), ("multistep", 2)])
def test_order_of_convergence(kind: str, order: int, shift: float) -> None:
    errors = [solve(kind, timesteps(n, shift)) for n in (200, 400, 800)]
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


def test_half_the_steps_of_second_order_beat_euler() -> None:
    assert solve("multistep", timesteps(25)) < solve("euler", timesteps(50)) / 5


def test_a_velocity_linear_in_time_is_integrated_exactly_after_the_first_step() -> None:
    times = np.array([0.0, 0.1, 0.35, 0.5, 1.0])
    solver, x = Solver("multistep"), 0.0
    for now, following in pairwise(times):
        x += (following - now) * solver.direction(2 * now + 1, following - now)
    exact = 2.0 - (0.1**2)  # ∫(2t + 1) is 2; Euler's first step misses h²
    assert x == pytest.approx(exact, abs=1e-12)


def test_forgetting_makes_the_next_step_eulers_and_copies_are_kept() -> None:
    solver = Solver("multistep")
    buffer = np.array([1.0])
    assert solver.direction(buffer, 0.1)[0] == 1.0
    buffer[0] = 3.0  # the memory is used again
    assert solver.direction(buffer, 0.1)[0] == pytest.approx(1.5 * 3 - 0.5 * 1)
    solver.forget()
    assert solver.direction(buffer, 0.1)[0] == 3.0
    with pytest.raises(BadRequestError, match="multistep"):
        Solver("dpm")


def test_interval() -> None:
    assert within(0.0, (0.0, 1.0)) and within(0.99, (0.0, 1.0))
    assert within(0.2, (0.2, 0.6)) and not within(0.6, (0.2, 0.6)) and not within(0.1, (0.2, 0.6))
    assert within(1.0, (0.5, 1.0))
