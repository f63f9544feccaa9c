"""`--preset`: what it sets, and that it is what the record was measured with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mindomni_rt.benchmarks.quality.precisions import arms
from mindomni_rt.options import PRESETS, build_parser, parse_interval

RECORD = Path(__file__).parents[1] / "benchmarks" / "results" / "2026-11-28-lossy-precisions.json"


def test_a_preset_sets_and_later_options_change() -> None:
    parse = build_parser().parse_args
    found = parse(["generate", "x", "--model", "m", "--steps", "7", "--preset", "fast", "--step-cache", "0.2"])
    assert (found.precision, found.steps, found.solver, found.step_cache) == ("int8", 25, "multistep", 0.2)
    assert parse_interval(found.guidance_interval) == (0.0, 0.6)
    plain = parse(["generate", "x", "--model", "m"])
    assert plain.preset is None and plain.precision is None and plain.steps is None


def test_the_preset_is_an_arm_that_kept_accuracy() -> None:
    name = "int8, 25 steps, interval 0:0.6, cache 0.1"
    precision, options = arms()[name]
    fast = PRESETS["fast"]
    assert precision == fast["precision"] and options["num_inference_steps"] == fast["steps"]
    assert options["solver"] == fast["solver"] and options["step_cache"] == fast["step_cache"]
    assert options["guidance_interval"] == parse_interval(fast["guidance_interval"])
    found = json.loads(RECORD.read_text(encoding="utf-8"))["options"]
    assert found[name]["n"] >= 300 and found[name]["share"] >= found["exact"]["interval"][0]
    assert found[name]["passes"] == pytest.approx(0.21, abs=0.02)
