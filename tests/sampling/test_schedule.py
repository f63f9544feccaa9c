"""Solvers and guidance on equations with known solutions."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

from mindomni_rt import BadRequestError
from mindomni_rt.sampling.schedule import Solver, plan_steps, timesteps, within


def solve(kind: str, times: np.ndarray) -> float:
    """x' = x cos 3t from x(0) = 1; x(1) = exp(sin(3) / 3)."""
    solver, x, before = Solver(kind), np.array(1.0), np.array(0.0)
    for now, following in pairwise(times):
        velocity = x * np.cos(3 * now)
        this, previous = solver.weights(following - now)
        x, before = x + this * velocity + previous * before, velocity
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
    solver, x, before = Solver("multistep"), 0.0, 0.0
    for now, following in pairwise(times):
        this, previous = solver.weights(following - now)
        x, before = x + this * (2 * now + 1) + previous * before, 2 * now + 1
    exact = 2.0 - (0.1**2)  # ∫(2t + 1) is 2; Euler's first step misses h²
    assert x == pytest.approx(exact, abs=1e-12)


def test_forgetting_makes_the_next_step_eulers() -> None:
    solver = Solver("multistep")
    assert solver.weights(0.1) == (0.1, 0.0)
    assert solver.weights(0.1) == pytest.approx((0.15, -0.05))
    assert solver.weights(0.2) == pytest.approx((0.4, -0.2))  # a step twice as long
    solver.forget()
    assert solver.weights(0.1) == (0.1, 0.0)
    assert [Solver().weights(h) for h in (0.1, 0.3)] == [(0.1, 0.0), (0.3, 0.0)]
    with pytest.raises(BadRequestError, match="multistep"):
        Solver("dpm")


def test_interval() -> None:
    assert within(0.0, (0.0, 1.0)) and within(0.99, (0.0, 1.0))
    assert within(0.2, (0.2, 0.6)) and not within(0.6, (0.2, 0.6)) and not within(0.1, (0.2, 0.6))
    assert within(1.0, (0.5, 1.0))


def test_a_plan_by_hand() -> None:
    """Five steps of 0.2, guided from 0.2 to 0.6, multistep: each jump of guidance begins with Euler's step."""
    steps = plan_steps(timesteps(5), 2, 3.0, (0.2, 0.6), "multistep", "condition_only")
    assert [s.index for s in steps] == [0, 1, 2, 3, 4] and {s.scale for s in steps} == {3.0}
    assert [s.branches for s in steps] == [1, 2, 2, 1, 1]
    assert [s.weight for s in steps] == pytest.approx([0.2, 0.2, 0.3, 0.2, 0.3])
    assert [s.previous_weight for s in steps] == pytest.approx([0, 0, -0.1, 0, -0.1])
    assert [s.outlook for s in steps] == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.0])
    assert [s.condition_only for s in steps] == [True, False, False, False, False]
    plain = plan_steps(timesteps(5), 1)
    assert all(s.branches == 1 and s.previous_weight == 0 and not s.condition_only for s in plain)
