"""What a request leaves behind: its buffers stay for the next one, but where that does not fit beside them."""

from __future__ import annotations

from typing import Any

import pytest

from mindomni_rt.memory.planner import parse_bytes

from .requests import END
from .runs import Runs
from .test_pictures import picture

pytestmark = pytest.mark.timeout(1800)
BUDGET = "8GB"
LOAD = {"device": "cuda:0", "precision": "bfloat16", "memory_budget": BUDGET}
LARGE: list[Any] = ["large", dict(height=1280, width=1408, num_inference_steps=2, end=END)]


def test_larger_buffers_go_where_a_request_needs_their_room(runs: Runs) -> None:
    """A large picture takes much in vision and prefill, a large image in its steps: each fits alone."""
    edit = ["edit", picture(108, height=256, width=256)]
    found = runs(folder=runs.thin, load=LOAD, requests=[LARGE, edit, LARGE])
    assert "decoder" in found["load"]["resident"]  # so that its buffers stay
    room = parse_bytes(BUDGET) - found["load"]["reserve"]
    for request in found["requests"]:
        assert not request["error"] and request["peak"] <= room, (request["name"], request["error"], request["stages"])


def test_buffers_stay_where_there_is_room(runs: Runs) -> None:
    requests = [
        [str(n), dict(prompt="red " * n, height=256, width=256, num_inference_steps=1, think=False)]
        for n in (900, 100, 900)
    ]
    found = runs(folder=runs.thin, load=LOAD, requests=requests)
    assert not any(request["error"] for request in found["requests"])
    assert found["captures"] == 1
