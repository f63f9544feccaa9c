"""The fuzzer itself, a small part of its mutants, and the record of a long run."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

if sys.platform != "linux":
    pytest.skip("forks and watches files as Linux does", allow_module_level=True)
pytest.importorskip("onnx", reason="graphs are changed with the onnx package")
pytest.importorskip("onnxruntime", reason="half of the mutants are bundles")

from fuzz import runner as running
from fuzz.change import Change, Mutant
from fuzz.mutants import kinds, make
from fuzz.record import PATH
from fuzz.runner import FAILURES, OUTCOMES, Runner
from mindomni_rt.errors import BadRequestError

ROOT = Path(__file__).parents[2]
MUTANTS = 10_000


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    with Runner() as made:
        yield made


def outcome(runner: Runner, call: Callable[[Any], Any], asked: str = "") -> str:
    change = Change(files={}, note="", asked=asked)
    mutant = Mutant(seed=0, number=0, target="options", kind="callback", source="refused", change=change, call=call)
    return runner.judge(mutant).outcome


def result(pipe: Any) -> Any:
    return SimpleNamespace(images=None, text="x", token_ids=(), finish_reason="stop")


def named(pipe: Any) -> Any:
    raise BadRequestError("no")


def bare(pipe: Any) -> Any:
    raise KeyError("x")


def crash(pipe: Any) -> Any:
    ctypes.string_at(0)


def leave(pipe: Any) -> Any:
    os._exit(3)


def memory(pipe: Any) -> Any:
    return np.ones(2**32, np.uint8)


def native_read(pipe: Any, folder: Path) -> Any:
    """As a library in another language reads: Python's audit events do not see it."""
    handle = ctypes.CDLL(None).open(os.fsencode(folder / "config.json"), os.O_RDONLY)
    assert handle >= 0
    return result(pipe)


def caught(pipe: Any) -> Any:
    """An error that is named does not excuse what was done before."""
    exec(compile("x = 1", "/tmp/theirs.py", "exec"), {})
    raise BadRequestError("no")


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (named, "named"),
        (bare, "bare"),
        (crash, "crash"),
        (leave, "crash"),
        (memory, "memory"),
        (lambda pipe: Path("/etc/passwd").read_text(), "outside"),
        (lambda pipe: Path(os.environ.get("TMPDIR", "/tmp"), f"fuzz-{os.getppid()}").touch(), "outside"),
        (lambda pipe: os.system("true"), "code"),
        (lambda pipe: subprocess.run(["true"], check=True), "code"),
        (caught, "code"),
        (result, "silently different"),
    ],
)
def test_every_failure_is_found(runner: Runner, call: Callable[[Any], Any], expected: str) -> None:
    assert outcome(runner, call) == expected


def test_a_result_that_was_asked_for(runner: Runner) -> None:
    assert outcome(runner, result, asked="another seed") == "changed, as asked"


def test_reads_by_native_code_are_found(runner: Runner) -> None:
    assert outcome(runner, lambda pipe: native_read(pipe, runner._outside)) == "outside"


def test_a_hang_is_found(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "WALL", 0.5)
    assert outcome(runner, lambda pipe: time.sleep(30)) == "hang"


def test_endless_work_is_found(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "SECONDS", 1)
    assert outcome(runner, lambda pipe: [None for _ in iter(int, 1)] and None) in ("hang", "memory")


@pytest.mark.parametrize("number", range(0, 400, 7))
def test_a_mutant_is_the_same_again(runner: Runner, number: int) -> None:
    first, second = (make(runner.sources, 5, number) for _ in range(2))
    assert (first.name, first.source, first.change.note) == (second.name, second.source, second.change.note)
    assert first.change.files == second.change.files


def test_a_small_part() -> None:
    """In a process of its own: a fork must not find the threads of other tests."""
    command = [sys.executable, "-W", "ignore", "-m", "fuzz", "--mutants", "150", "--seed", "2"]
    paths = f"{ROOT / 'tests'}{os.pathsep}{ROOT}"
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def test_the_record() -> None:
    record = json.loads(PATH.read_text(encoding="utf-8"))
    assert record["mutants"] >= MUTANTS
    assert sorted(record["by_kind"]) == kinds(), "other kinds of mutations than recorded: python -m fuzz --record"
    assert all(record["by_kind"].values()), "a kind without a mutant"
    assert not any(record["outcomes"][name] for name in FAILURES) and record["failures"] == []
    assert set(record["outcomes"]) == set(OUTCOMES)
    assert sum(record["outcomes"].values()) == record["mutants"]
    assert sum(sum(counts.values()) for counts in record["by_kind"].values()) == record["mutants"]


def test_the_cache_of_other_tests_is_given_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with Runner():
        assert os.environ["XDG_CACHE_HOME"] != str(tmp_path)
    assert os.environ["XDG_CACHE_HOME"] == str(tmp_path)
