"""Launch tables say each thing once; loads of one-row products are in flight as the tables say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import pytest

from mindomni_rt.kernels.aot import MODULES
from mindomni_rt.kernels.decode_attention import SPLITS, most_splits
from mindomni_rt.kernels.launch import Launch

ROOT = Path(__file__).parents[2]
COMPILE = """
import dataclasses, json, sys
from importlib import import_module
from mindomni_rt.kernels.aot import compile_spec
found = {}
for module, name in (("gemv", "gemv"), ("norm_gemv", "norm_gemv"), ("int4_linear", "int4_gemv")):
    for sm in (80, 90):
        spec = next(s for s in import_module("mindomni_rt.kernels." + module).specs(sm, "bf16") if s.name == name)
        for stages in (1, 2, 3):
            constants = {**spec.constants, "STAGES": stages}
            made = compile_spec(dataclasses.replace(spec, constants=constants, stages=stages), sm)
            words = ("cp.async.c", "griddepcontrol.wait", "griddepcontrol.launch_dependents", "prefetch.global.L2")
            found[f"{name} {sm} {stages}"] = [made.shared, *(made.ptx.count(word) for word in words)]
json.dump(found, sys.stdout)
"""


def tables() -> list[tuple[str, dict[int, Launch]]]:
    found = []
    for name in (*MODULES, "plugin"):
        module = import_module(f"mindomni_rt.kernels.{name}")
        for key, table in vars(module).items():
            if isinstance(table, dict) and table and all(isinstance(v, Launch) for v in table.values()):
                found.append((f"{name}.{key}", table))
    return found


@pytest.mark.parametrize(("name", "table"), tables(), ids=[name for name, _ in tables()])
def test_no_row_repeats_the_one_before(name: str, table: dict[int, Launch]) -> None:
    assert all(before != after for before, after in pairwise(table[sm] for sm in sorted(table))), name


def test_a_short_cache_has_few_splits() -> None:
    assert [most_splits(tokens, 64) for tokens in (64, 512, 1024, 2048, 8192)] == [1, 8, 16, 32, SPLITS]


@pytest.mark.compile
def test_loads_are_in_flight() -> None:
    """Asynchronous copies and their room grow with the stages; on Hopper a product waits for the one before it and asks
    for its first weights meanwhile."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    for name in ("gemv", "norm_gemv", "int4_gemv"):
        for sm in (80, 90):
            one, two, three = (found[f"{name} {sm} {stages}"] for stages in (1, 2, 3))
            assert one[1] == 0 < two[1] < three[1] and one[0] < two[0] < three[0], (name, sm)
            assert all(bool(count) == (sm == 90) for count in three[2:]), (name, sm)
