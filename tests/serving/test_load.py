"""The load test, small: `mindomni bench load` with sixty requests. The large one's record is in benchmarks/results/."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mindomni_rt.benchmarks.cli import main
from mindomni_rt.benchmarks.load.command import complaints
from mindomni_rt.benchmarks.results import problems
from serving.serving_tools import BUNDLE

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def test_sixty_requests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "load.json"
    code = main(["load", BUNDLE, "--requests", "60", "--clients", "12", "--max-queue", "8", "--out", str(out)])
    result = json.loads(out.read_text())
    # So short a run is no measure of memory: the allocator still grows.
    result["memory"]["growth"] = 0.0
    assert complaints(result) == [] and code in (0, 1), capsys.readouterr().out
    assert result["outcomes"]["answered"] >= 45 and not problems(result)


def test_the_record() -> None:
    """2,000 requests at 32 at once, a tenth of the clients leaving early: none lost, none mixed up, memory flat."""
    for path in RESULTS.glob("*-load.json"):
        result = json.loads(path.read_text())
        assert complaints(result) == [] and not problems(result)
        assert result["requests"] >= 2000 and result["clients"] >= 32 and result["outcomes"]["left"] >= 100


def test_complaints() -> None:
    good = {
        "requests": 10,
        "outcomes": {"answered": 8, "left": 2, "refused": 1},
        "wrong": [],
        "server": {"counted": 10.0, "left_in_queue": 0.0},
        "memory": {"growth": 0.01},
    }
    assert complaints(good) == []
    for change, words in (
        ({"outcomes": {"answered": 7, "left": 2, "lost": 1}}, "1 requests were lost"),
        ({"server": {"counted": 12.0, "left_in_queue": 0.0}}, "the server counts 12"),
        ({"server": {"counted": 8.0, "left_in_queue": 0.0}}, "the server counts 8"),
        ({"server": {"counted": 10.0, "left_in_queue": 3.0}}, "3 requests are still"),
        ({"memory": {"growth": 0.06}}, "memory grew by 6.0%"),
        ({"wrong": ["image 1: 200 x"]}, "image 1"),
    ):
        assert words in "".join(complaints({**good, **change}))
