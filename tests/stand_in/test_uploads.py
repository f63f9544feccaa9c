"""Blocks of the decoder that arrive while text is written: on a stream of their own, within the plan, as many as it
says."""

from __future__ import annotations

from typing import Any

import pytest

from mindomni_rt.checkpoint.config import published
from mindomni_rt.devices.table import RESERVE
from mindomni_rt.memory.layers import Workload
from mindomni_rt.memory.planner import parse_bytes, plan
from mindomni_rt.memory.precision import parse_precision

from .requests import LONGER
from .runs import Runs
from .test_requests import QUICK, job

pytestmark = pytest.mark.timeout(1800)
STEPS: dict[str, Any] = dict(num_inference_steps=3)
REQUESTS: list[Any] = [
    ["first", STEPS],
    ["second", {**LONGER, **STEPS}],
    ["cancelled", dict(stop=1, **STEPS)],
    ["understand", dict(understand="what is it", image=True)],
    ["silent", dict(think=False, **STEPS)],
    ["drafts", dict(draft_tokens=4, **STEPS)],
    ["last", STEPS],
]
CASES = [
    ("int4", "8GB"),  # some blocks
    pytest.param("int4", "12GB", marks=pytest.mark.slow),  # all
    pytest.param("int8", "16GB", marks=pytest.mark.slow),  # all
    pytest.param("int8", "12GB", marks=pytest.mark.slow),  # some, and the language model itself comes and goes
]


def seen(runs: Runs, precision: str | None, budget: str) -> dict[str, Any]:
    load = {"device": "cuda:0", "memory_budget": budget, **({"precision": precision} if precision else {})}
    quick = (precision, budget) in QUICK
    found = runs(**job(precision, budget)) if quick else runs(load=load, requests=REQUESTS)
    assert not found["load"]["error"], found["load"]["error"]
    assert not found["faults"] and not found["stuck"]
    for request in found["requests"]:
        assert not request["error"], (request["name"], request["error"])
    return found


@pytest.mark.parametrize(("precision", "budget"), CASES)
def test_blocks_arrive_beside_the_text(runs: Runs, precision: str | None, budget: str) -> None:
    found = seen(runs, precision, budget)
    planned = found["load"]["plan"]
    assert 0 < planned["hidden_bytes"] <= planned["moved_bytes"]
    for request in found["requests"]:
        if request["name"] in ("silent", "understand"):
            assert not request["hidden"] and not request["beside"], request["name"]
            continue
        # Every byte that is hidden was queued off the default stream, before the first step was read. Of drafts each
        # step is read at once, the token of the prefill among them.
        assert request["beside"] == {"language": request["hidden"]}, request["name"]
        assert request["read"] == [int(request["name"] == "drafts")], request["name"]
        assert request["hidden"] == planned["hidden_bytes"], request["name"]
        if request["name"] != "cancelled":  # which needs no VAE; the scales of 8-bit weights are not in the plan
            assert abs(request["moved"] / planned["moved_bytes"] - 1) < 0.005, request["name"]


@pytest.mark.parametrize(("precision", "budget"), CASES)
def test_the_peak_counts_what_has_arrived(runs: Runs, precision: str | None, budget: str) -> None:
    found = seen(runs, precision, budget)
    room, highest = parse_bytes(budget) - found["load"]["reserve"], 0
    for request in found["requests"]:
        highest = max(highest, request["planned"])
        assert request["peak"] <= min(room, highest or room), request["name"]


def test_no_room_is_said() -> None:
    """16 GB hold the 16-bit language model and no block of the decoder beside it."""
    precision = parse_precision("bfloat16", "bfloat16", "bfloat16")
    found = plan(published(), Workload(joint=True), precision=precision, budget=16 * 10**9, reserve=RESERVE[False])
    assert found.moved and not found.hidden and "none of it while text is written" in found.summary()
