"""The shipped small model against its own record: the record's claims, and that evaluating again meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mindomni_rt.training.evaluation.evaluate import main
from mindomni_rt.training.pack import RECORD
from mindomni_rt.training.scores import departures, pool

MODEL = Path(__file__).parents[2] / "assets" / "shapes-world"


@pytest.fixture(scope="module")
def record():
    return json.loads((MODEL / RECORD).read_text(encoding="utf-8"))


def test_the_record_holds_what_is_claimed_of_the_model(record):
    assert list(record) == ["prior", "pretrain", "sft", "rgpo"]
    before, after = record["sft"]["scores"], record["rgpo"]["scores"]
    for stage in ("sft", "rgpo"):
        settings = record[stage]["settings"]
        assert settings["n"] >= 500 and len(settings["seeds"]) == 3
        assert len(record[stage]["by_seed"]) == 3
    right = after["riddles"]["image"]["share"]
    assert right >= 0.95
    assert right - before["riddles"]["image"]["share"] >= 0.3
    assert right - after["direct"]["image"]["share"] >= 0.3
    assert after["captions"]["image"]["share"] >= 0.9
    assert after["questions"]["text"]["share"] >= 0.95  # what stage 3 must not have made it forget
    assert record["pretrain"]["scores"]["captions"]["image"]["share"] >= 0.95


def test_the_record_is_the_sum_of_its_seeds(record):
    for stage in record.values():
        assert pool(list(stage["by_seed"].values())) == stage["scores"]


@pytest.mark.timeout(200)
def test_evaluating_the_model_again_meets_the_record(capsys):
    suites = [x for s in ("riddles", "direct", "captions", "edits", "questions") for x in ("--suite", s)]
    arguments = [str(MODEL), "--n", "48", "--seeds", "7", "--device", "cpu", *suites]
    assert main([*arguments, "--against", str(MODEL / RECORD)]) == 0
    assert "all intervals meet" in capsys.readouterr().out


def test_a_worse_model_departs_from_the_record(record):
    scores = record["rgpo"]["scores"]
    worse = {"riddles": {"image": {"share": 0.5, "interval": [0.36, 0.64]}}}
    assert len(departures(worse, scores)) == 1
    assert not departures({"riddles": {"image": scores["riddles"]["image"]}}, scores)
