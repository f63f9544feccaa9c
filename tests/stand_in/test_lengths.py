"""Twenty requests of twenty lengths: what depends on a prompt's length alone is made once, not once a request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from .runs import Runs

pytestmark = pytest.mark.timeout(1800)
MOST_CAPTURES = 3
REQUESTS: list[Any] = [
    [
        f"{words} words",
        dict(prompt="red " * words, max_new_tokens=words, end=0, height=256, width=256, num_inference_steps=2),
    ]
    for words in range(6, 166, 8)
]


def job(runs: Runs, **more: Any) -> dict[str, Any]:
    return {"folder": runs.thin, "load": {"device": "cuda:0", "precision": "int8"}, "requests": REQUESTS, **more}


def lengths(found: dict[str, Any]) -> set[int]:
    return {r["work"]["prompt_tokens"] + r["work"]["new_tokens"] for r in found["requests"]}


@pytest.mark.slow
def test_lengths_cost_nothing(runs: Runs, tmp_path: Path) -> None:
    first = runs(**job(runs, cache=str(tmp_path)))
    for request in first["requests"]:
        assert not request["error"], request["error"]
    assert len(REQUESTS) == 20 == len(lengths(first))
    assert first["captures"] <= MOST_CAPTURES and first["plans"] == 0 and first["timings"] > 0
    alone = runs(**{**job(runs), "requests": REQUESTS[:1]})
    assert alone["timings"] == first["timings"]  # nothing is measured again for another length
    again = runs(**{**job(runs, cache=str(tmp_path)), "requests": REQUESTS[-1:]})
    assert again["timings"] == 0 and not again["requests"][0]["error"]  # nor by another process


def test_buffers_double(runs: Runs) -> None:
    """Longer prompts than any before make new buffers, half as long ones do not."""
    sizes = (900, 400, 100)
    requests = [
        [str(n), dict(prompt="red " * n, height=256, width=256, num_inference_steps=1, think=False)]
        for n in (*sizes, *sizes)
    ]
    found = runs(folder=runs.thin, load={"device": "cuda:0"}, requests=requests)
    assert all(not r["error"] for r in found["requests"])
    assert found["captures"] == 1 and found["plans"] == 0
