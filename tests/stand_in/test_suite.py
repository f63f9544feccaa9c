"""`mindomni bench gpu` runs on a device: each part finds something, is judged and timed."""

from __future__ import annotations

from typing import Any

import pytest

from mindomni_rt.benchmarks.results import _faults
from mindomni_rt.benchmarks.shapes import KINDS
from mindomni_rt.kernels.launch import SHARED_LIMIT

from .runs import Runs
from .suite import SIDE

pytestmark = pytest.mark.timeout(1800)
QUICK = ("ceilings", "correctness", "step", "precisions: decoder=int8", "kernels", "sweep")
REST = ("tokens", "request", "precisions", "budgets")
"""Peers, which are other people's code, cannot be imported in the process of a stand-in."""


def seen(runs: Runs, parts: tuple[str, ...]) -> dict[str, Any]:
    found = runs(suite=list(parts), folder="")
    assert not found["faults"] and not found["stuck"]
    sections: dict[str, Any] = found["sections"]
    for name, section in sections.items():
        assert not {"failed", "skipped", "missing"} & set(section), (name, section)
        assert not any("failed" in case or "does not run" in str(case) for case in section.get("cases", ())), name
    assert not list(_faults(sections, KINDS["gpu"]["sections"], ""))
    return sections


def test_parts_in_order_of_value(runs: Runs) -> None:
    sections = seen(runs, QUICK)
    for name in (f"velocity {SIDE}", "hidden states", "decoder=int8"):
        assert sections[name]["right"] and sections[name]["baseline_error"] is not None, name
    assert sections[f"ours {SIDE}"]["step_s"] > 0 and sections["decoder=int8"]["step_s"] > 0
    assert all(case["right"] and case["seconds"]["ours"] > 0 for case in sections["kernels"]["cases"])
    swept = {name: found for name, found in sections["sweep"].items() if isinstance(found, dict) and "best" in found}
    assert len(swept) == 4 and all(found["best"] and not found["refused"] for found in swept.values())
    assert len(SHARED_LIMIT) == len(sections["sweep"]["shared_limits"])


@pytest.mark.slow
def test_the_other_parts(runs: Runs) -> None:
    sections = seen(runs, REST)
    assert all(section["under"] for name, section in sections.items() if name.startswith("budget "))
