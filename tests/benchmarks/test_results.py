"""What is sent and read by others: result files and their check, one planner, the GPU that is named, plain ticks."""

from __future__ import annotations

import copy
import itertools
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mindomni_rt.benchmarks.cli import main
from mindomni_rt.benchmarks.machine import physical
from mindomni_rt.benchmarks.results import FOLDER, KINDS, all_results, problems
from mindomni_rt.checkpoint.config import published
from mindomni_rt.devices.table import RESERVE
from mindomni_rt.export.plan import plan_build
from mindomni_rt.figures import log_axis, new_figure
from mindomni_rt.memory.layers import Workload
from mindomni_rt.memory.planner import parse_bytes, plan

COMMANDS = ["latency", "peers", "counts", "quality", "gpu", "plan", "roofline", "compare", "lossy", "load", "check"]
LATENCY = FOLDER / "2026-11-25-cpu-latency.json"


def test_the_stored_results_pass_their_check(capsys: pytest.CaptureFixture[str]) -> None:
    checked = set()
    for path in FOLDER.glob("*.json"):
        data = json.loads(path.read_text())
        if data.get("kind") in KINDS:
            assert main(["check", str(path)]) == 0, capsys.readouterr().out
            checked.add(data["kind"])
    assert checked >= {"latency", "counts", "peers"}


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (["kind"], "speed", "kind 'speed'"),
        (["format"], 2, "format 2"),
        (["model", "dtype"], None, "lacks model.dtype"),
        (["runs"], [], "runs: expected a list that is not empty"),
        (["runs", 0, "total"], "fast", "runs.0.total: expected int or float, found 'fast'"),
        (["runs", 0, "total"], float("nan"), "runs.0.total: nan is no finite number"),
        (["warmup"], True, "warmup: expected int, found True"),
        (["machine"], [], "machine: expected an object"),
    ],
)
def test_a_fault_is_named(path: list[Any], value: Any, expected: str) -> None:
    data = copy.deepcopy(json.loads(LATENCY.read_text()))
    place: Any = data
    for key in path[:-1]:
        place = place[key]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    assert any(expected in line for line in problems(data)), problems(data)


def test_check_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.json"
    path.write_text('{"kind": "gpu", "format": 1}')
    assert main(["check", str(path)]) == 1
    assert "lacks sections" in capsys.readouterr().out
    path.write_text("{")
    assert main(["check", str(path)]) == 2 and "not readable JSON" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (["workload", "odd"], 3, "workload: .*'odd'"),
        (["workload", "steps"], -1, "workload: steps = -1: expected at least 1"),
        (["workload", "height"], 7, "workload: height = 7"),
        (["workload", "steps"], 10**30, "workload.steps: 1000.* is too large"),
        (["runs", 0, "total"], 10**400, "runs.0.total: 1000.* is too large"),
        (["warmup"], "1" * 5000, "warmup: expected int"),
        (["model", "config"], {}, r"r\.json: model configuration is incomplete"),
        (["model", "config", "language"], 3, r"r\.json: model configuration is incomplete"),
    ],
)
def test_results_that_lie(
    tmp_path: Path, path: list[Any], value: Any, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = json.loads(LATENCY.read_text())
    place: Any = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    other = tmp_path / "r.json"
    other.write_text(json.dumps(data))
    command = ["roofline", "--device", "rtx4060"] if path[0] == "model" else ["compare", str(other), str(other)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(all_results, "__defaults__", (tmp_path,))
        assert main(command) == 2
    error = capsys.readouterr().err
    assert re.search(expected, error) and error.count("\n") == 1, error


def test_requests_that_differ_are_named_by_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = json.loads(LATENCY.read_text())
    data["workload"]["steps"] += 1
    other = tmp_path / "r.json"
    other.write_text(json.dumps(data))
    assert main(["compare", str(LATENCY), str(other)]) == 2
    error = capsys.readouterr().err
    assert f"different requests: steps {data['workload']['steps'] - 1} and {data['workload']['steps']}" in error
    assert "Workload(" not in error


def test_compare_prints_no_python_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All pairs of committed results, and two latency results whose requests differ in every type of field."""
    results = sorted(FOLDER.glob("*.json"))
    data = json.loads(LATENCY.read_text())
    data["workload"] |= {"patches": [12, 14], "guidance": not data["workload"]["guidance"]}
    (tmp_path / "other.json").write_text(json.dumps(data))
    for pair in [*itertools.product(results, results), (LATENCY, tmp_path / "other.json")]:
        main(["compare", *map(str, pair)])
        shown = "".join(capsys.readouterr())
        assert not re.search(r"None|True|False|<|>|[A-Za-z]+\(|\(\d+,|\{|\[", shown), shown
    assert "patches 0x0 and 12x14" in shown and re.search("guidance (yes and no|no and yes)", shown)


def test_plan_and_export_plan_share_bytes_and_reserve() -> None:
    """The same precision within the same memory: the peaks differ by the engines' fixed KV cache alone."""
    built = plan_build("rtx4060", budget="8GiB")
    cache = built.memory.reserve - RESERVE[False]
    budget = parse_bytes("8GiB")
    loaded = plan(published(), Workload(), precision=built.memory.precision, budget=budget, reserve=RESERVE[False])
    if loaded.resident == built.memory.resident:
        assert loaded.peak == built.memory.peak - cache
    assert loaded.stages == built.memory.stages and 0 < cache < 10**9


def test_plan_takes_a_precision_and_a_size(capsys: pytest.CaptureFixture[str]) -> None:
    for size in ("512", "512x512"):
        assert main(["plan", "--memory-budget", "8GiB", "--precision", "int4", "--size", size]) == 0
        out = capsys.readouterr().out
        assert "512x512" in out and "language int4" in out and "0.70 GB of it for the system" in out
    assert main(["plan", "--memory-budget", "8GiB", "--size", "512x"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "command", ["latency", "peers", "counts", "quality", "gpu", "plan", "roofline", "compare", "lossy", "load"]
)
def test_unknown_options_are_one_line(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--no-such-option"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


def test_nvml_is_asked_for_the_gpu_that_cuda_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA counts the GPUs of CUDA_VISIBLE_DEVICES, NVML counts all."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert physical("cuda") == "0" and physical("cuda:2") == "2"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-8a56,MIG-1")
    assert [physical(f"cuda:{i}") for i in range(3)] == ["3", "GPU-8a56", "MIG-1"]
    properties = SimpleNamespace(uuid="12ab-34")
    cuda = SimpleNamespace(is_available=lambda: True, get_device_properties=lambda index: properties)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    assert physical("cuda:1") == "GPU-12ab-34"


def test_ticks_are_plain_numbers() -> None:
    pytest.importorskip("matplotlib")
    for low, high, expected in ((30, 150, ["40", "60", "100"]), (0.5, 900, ["1", "10", "100"])):
        figure, axes = new_figure(4, 2)
        axes.plot([low, high], [0, 1])
        log_axis(axes)
        figure.canvas.draw()
        shown = [tick.get_text() for tick in axes.get_xticklabels()]
        assert set(expected) <= set(shown) and not any("10^" in text or "×" in text for text in shown)
        assert not [tick for tick in axes.get_xticklabels(minor=True) if tick.get_text()]
