"""The fast path at the published sizes on a stand-in for a GPU: errors, waits of the host, memory against the plan."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from .requests import OPTIONS, PLAIN
from .runs import Runs

PRECISIONS = (None, "bfloat16", "fp8", "int8", "int4")
BUDGETS = (None, "8GB", "12GB", "16GB", "24GB")
QUICK = ((None, None), ("int4", "8GB"), ("int8", "12GB"), ("fp8", "16GB"))
"""Run always; the others are slow."""


def job(precision: str | None, budget: str | None) -> dict[str, Any]:
    options = {k: v for k, v in (("precision", precision), ("memory_budget", budget)) if v}
    requests = [*PLAIN, *(OPTIONS if budget is None else ())]
    return {"load": {"device": "cuda:0", **options}, "requests": requests}


def cases() -> list[Any]:
    return [
        pytest.param(p, b, id=f"{p}-{b}", marks=() if (p, b) in QUICK else pytest.mark.slow)
        for p, b in product(PRECISIONS, BUDGETS)
    ]


@pytest.fixture(scope="module", autouse=True)
def _begun(runs: Runs, request: pytest.FixtureRequest) -> None:
    """Starts the quick jobs together."""
    for precision, budget in QUICK:
        runs.begin(job(precision, budget))


def seen(runs: Runs, precision: str | None, budget: str | None) -> dict[str, Any]:
    """A run, or a skip where the planner says that nothing fits."""
    found = runs(**job(precision, budget))
    if found["load"].get("kind") == "OutOfMemoryError" and budget is not None:
        pytest.skip(found["load"]["error"].strip().splitlines()[-1])
    assert not found["load"]["error"], found["load"]["error"]
    return found


@pytest.mark.parametrize(("precision", "budget"), cases())
def test_every_request_runs(runs: Runs, precision: str | None, budget: str | None) -> None:
    found = seen(runs, precision, budget)
    for request in found["requests"]:
        assert not request["error"], (request["name"], request["error"])
    assert not found["faults"] and not found["stuck"]
    kernels = {launch["kernel"].split(".")[0] for launch in found["launches"]}
    assert {"norms", "rope", "swiglu", "segment_attention", "decode_attention"} <= kernels


@pytest.mark.parametrize(("precision", "budget"), cases())
def test_no_step_waits(runs: Runs, precision: str | None, budget: str | None) -> None:
    """Between two steps and between two tokens the host asks the device for nothing, but where a step depends on it:
    one number a step for the step cache, four reads and writes for a draft."""
    for request in seen(runs, precision, budget)["requests"]:
        most = 1 if request["name"] == "step cache" else 0
        for waits in request["step_waits"][1:]:
            assert len(waits) <= most, (request["name"], waits)
        most = 4 if request["name"] in ("drafts", "drawn") else 0
        for waits in request["token_waits"][1:]:
            assert len(waits) <= most, (request["name"], waits)
