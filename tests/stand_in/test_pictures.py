"""Large reference pictures: what has room runs within its plan, and what has none is refused before any work."""

from __future__ import annotations

from typing import Any

import pytest

from mindomni_rt.memory.planner import parse_bytes

from .runs import Runs

pytestmark = pytest.mark.timeout(1800)
SHORT: dict[str, Any] = dict(num_inference_steps=2, end=6, max_image_tokens=None)
SQUARE = 28  # pixels of a side that one token stands for


def picture(tokens: int, **more: Any) -> dict[str, Any]:
    """A request with a square picture of tokens² tokens."""
    return {"image": [tokens * SQUARE] * 2, **SHORT, **more}


REQUESTS: list[Any] = [
    ["edit, 37²", picture(37, height=512, width=512)],
    ["edit with the VAE", picture(37, height=256, width=256, edit_features="vit+vae")],
    ["edit, 64²", picture(64, height=512, width=512)],
    ["edit, 128²", picture(128, height=512, width=512)],
    ["question, 96²", {"understand": "what is it", "image": [96 * SQUARE] * 2, "max_image_tokens": None}],
    ["question, 128²", {"understand": "what is it", "image": [128 * SQUARE] * 2, "max_image_tokens": None}],
    ["edit, capped", {**picture(128, height=512, width=512), "max_image_tokens": 1369}],
]
CASES = [
    pytest.param(True, dict(memory_budget="9GB"), id="thin"),
    pytest.param(False, dict(precision="int4", memory_budget="12GB"), marks=pytest.mark.slow, id="int4-12GB"),
    pytest.param(False, dict(precision="int4", memory_budget="8GB"), marks=pytest.mark.slow, id="int4-8GB"),
]


@pytest.mark.parametrize(("thin", "load"), CASES)
def test_pictures_within_the_plan(runs: Runs, thin: bool, load: dict[str, Any]) -> None:
    folder = runs.thin if thin else runs.full
    found = runs(folder=folder, load={"device": "cuda:0", **load}, requests=REQUESTS)
    assert not found["load"]["error"] and not found["faults"], found
    room, planned = parse_bytes(load["memory_budget"]) - found["load"]["reserve"], 0
    refused = {request["name"] for request in found["requests"] if request["kind"]}
    assert "edit, 128²" in refused and not refused & {"edit, 37²", "edit, capped"}, refused
    for request in found["requests"]:
        if request["kind"]:
            assert request["kind"] == "OutOfMemoryError" and "max_image_tokens=" in request["error"], request["error"]
            assert not request["stages"], request["stages"]  # nothing was allocated for it
            continue
        planned = max(planned, request["planned"])
        assert request["peak"] <= min(room, planned), (request["name"], request["peak"], planned, request["stages"])
