"""Every launch of a request on every SM: through Triton's binder (recorded) and compiler, against the table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mindomni_rt import Request
from mindomni_rt.kernels.launch import SHARED_LIMIT, SMS

from .compiled import DEFAULT, TABLE, launches, names, rises
from .runs import ROOT, Runs

MOST_REGISTERS = 255


@pytest.mark.compile
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("sm", SMS)
def test_launches_compile_and_do_not_grow(runs: Runs, sm: int, tmp_path: Path) -> None:
    """Types, shared memory, registers and spills; after a wanted change write the table anew (`stand_in.compiled`)."""
    recorded = tmp_path / "launches.json"
    recorded.write_text(json.dumps(launches(runs, sm)), encoding="utf-8")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT / "tests"), str(ROOT)))
    command = [sys.executable, "-m", "stand_in.compiled", "--sm", str(sm), "--launches", str(recorded)]
    out = tmp_path / "table.json"
    done = subprocess.run(
        [*command, "--out", str(out)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text(encoding="utf-8"))[f"sm_{sm}"]
    assert not rises(json.loads(TABLE.read_text(encoding="utf-8")).get(f"sm_{sm}", {}), found)


@pytest.mark.slow
def test_the_table_has_what_a_default_request_launches(runs: Runs) -> None:
    found = runs(folder=runs.thin, load={"device": "cuda:0"}, requests=[DEFAULT])
    assert not found["load"]["error"] and not found["requests"][0]["error"], found
    work, launched = found["requests"][0]["work"], names(found["launches"])
    assert (work["height"], work["width"], work["max_new_tokens"]) == (1024, 1024, Request.max_new_tokens)
    assert any("SPLITS=16" in name for name in launched)  # of a cache with room for 640 tokens, in blocks of 64
    assert launched <= set(json.loads(TABLE.read_text(encoding="utf-8"))["sm_90"])


@pytest.mark.parametrize("sm", SMS)
def test_the_table_has_what_a_block_may_take(sm: int) -> None:
    for name, sizes in json.loads(TABLE.read_text(encoding="utf-8"))[f"sm_{sm}"].items():
        assert sizes["shared"] <= SHARED_LIMIT[sm] and sizes["registers"] <= MOST_REGISTERS, (name, sizes)


def test_a_rise_is_found() -> None:
    before = {"a": {"registers": 40, "spilled": 0, "shared": 100}}
    assert rises(before, before) == []
    assert rises(before, {"a": {"registers": 39, "spilled": 0, "shared": 100}}) == []
    assert rises(before, {"a": {"registers": 40, "spilled": 8, "shared": 100}}) == ["a: spilled 0 -> 8"]
    assert rises(before, {"b": before["a"]}) == ["b is not in the table"]
