"""The fast path at the published sizes on a stand-in for a GPU: errors, waits of the host, memory against the plan."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from mindomni_rt import OutOfMemoryError
from mindomni_rt.devices.table import RESERVE
from mindomni_rt.memory.planner import parse_bytes

from .checkpoint import sizes
from .plans import chosen
from .requests import OPTIONS, PLAIN, SEVERAL_GRAPHS
from .runs import Runs

PRECISIONS = (None, "bfloat16", "fp8", "int8", "int4")
BUDGETS = (None, "8GB", "12GB", "16GB", "24GB")
QUICK: dict[Any, tuple[str, ...]] = {
    ("int4", "8GB"): ("step cache", "understand", "silent", "drafts", "last"),
}
"""Run always, with these requests beside the plain ones, all but the first through two blocks of each stack; the others
are slow. `test_options` has every option."""
pytestmark = pytest.mark.timeout(1800)


def job(precision: str | None, budget: str | None) -> dict[str, Any]:
    options = {k: v for k, v in (("precision", precision), ("memory_budget", budget)) if v}
    some = QUICK.get((precision, budget), OPTIONS if budget is None else SEVERAL_GRAPHS)
    few = {"blocks": 2} if (precision, budget) in QUICK else {}
    return {"load": {"device": "cuda:0", **options}, "requests": [*PLAIN, *some], **few}


def cases() -> list[Any]:
    """All precisions and budgets, the slow ones marked."""
    found = []
    for case in product(PRECISIONS, BUDGETS):
        marks = [] if case in QUICK else [pytest.mark.slow]
        found.append(pytest.param(*case, id="-".join(map(str, case)), marks=marks))
    return found


def seen(runs: Runs, precision: str | None, budget: str | None) -> dict[str, Any]:
    """A run, or a skip where the planner says that nothing fits, which loading must say too."""
    found = runs(**job(precision, budget))
    try:
        chosen(sizes(), "bfloat16", precision, budget, RESERVE[False])
    except OutOfMemoryError as error:
        assert found["load"]["kind"] == "OutOfMemoryError", found["load"]
        pytest.skip(str(error))
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


@pytest.mark.parametrize(("precision", "budget"), cases())
def test_the_peak_is_what_was_planned(runs: Runs, precision: str | None, budget: str | None) -> None:
    """Live bytes, pools of graphs included, against the planner's figure for the largest request so far."""
    found = seen(runs, precision, budget)
    planned, over = 0, []
    for request in found["requests"]:
        planned = max(planned, request["planned"])
        if planned and request["peak"] > planned:
            over.append(f"{request['name']}: {request['peak'] / 1e9:.2f} GB of {planned / 1e9:.2f} planned")
    assert not over, over


@pytest.mark.parametrize(("precision", "budget"), [c for c in cases() if c.values[1] is not None])
def test_a_budget_holds(runs: Runs, precision: str | None, budget: str | None) -> None:
    """Requests of the size that budgets are planned for, with what the driver and libraries take."""
    found = seen(runs, precision, budget)
    room = parse_bytes(budget or "") - found["load"]["reserve"]
    over = [f"{r['name']}: {r['peak'] / 1e9:.2f} GB of {room / 1e9:.2f}" for r in found["requests"] if r["peak"] > room]
    assert not over, over
