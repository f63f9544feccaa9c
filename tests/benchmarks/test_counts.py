"""The gate on counts: what a fixed request costs has not risen, and would be noticed if it had."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from mindomni_rt.benchmarks import counts as command
from mindomni_rt.benchmarks.cli import main
from mindomni_rt.benchmarks.compare import EVERYWHERE, count_changes
from mindomni_rt.benchmarks.counts import BASELINE, counting, counting_flops, measure
from mindomni_rt.benchmarks.results import read_checked
from mindomni_rt.model.decoder import DiffusionDecoder

RENEW = "; where that is meant: mindomni bench counts --out benchmarks/results/counts-baseline.json"


@pytest.fixture(scope="module")
def counted() -> dict[str, Any]:
    return measure()


def store(path: Path, data: dict[str, Any]) -> str:
    path.write_text(json.dumps(data))
    return str(path)


def risen(counted: dict[str, Any], metrics: Callable[[str], bool]) -> list[str]:
    found, _ = count_changes(read_checked(BASELINE, "counts"), counted)
    return [f"{r.metric}: {r.a} -> {r.b}" for r in found if metrics(r.metric.split()[-1]) and r.worse(0)]


def test_operations_have_not_risen(counted: dict[str, Any]) -> None:
    found, _ = count_changes(read_checked(BASELINE, "counts"), counted)
    assert sum(r.metric.endswith("flops") for r in found) == 7  # on any version of torch
    assert not risen(counted, lambda metric: metric == "flops"), RENEW


def test_graphs_have_not_grown(counted: dict[str, Any]) -> None:
    if find_spec("onnx") is None:
        pytest.skip("NOT GATED: nodes and weights of the graphs, onnx is not installed")
    assert len(counted["graphs"]) == 11
    assert not risen(counted, lambda metric: metric in ("nodes", "weight_bytes")), RENEW


def test_operators_and_memory_have_not_risen(counted: dict[str, Any]) -> None:
    before = read_checked(BASELINE, "counts")["torch"]
    if before != counted["torch"]:
        pytest.skip(f"NOT GATED: operators and bytes, whose baseline is of torch {before}; this is {counted['torch']}")
    assert not risen(counted, lambda metric: metric not in EVERYWHERE), RENEW


def test_compare_says_the_same(counted: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = store(tmp_path / "b.json", counted)
    assert main(["compare", new, new]) == 0
    assert "50 counts compared, 50 the same" in capsys.readouterr().out or not counted["graphs"]
    assert main(["compare", str(BASELINE), new]) == 0, capsys.readouterr().out


def test_another_process_counts_the_same(counted: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "c.json"
    told = {**os.environ, "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-m", "benchmarks", "counts", "--out", str(out)], check=True, env=told, timeout=200)
    other = json.loads(out.read_text())
    for key in ("stages", "graphs", "operators"):
        assert other[key] == counted[key]


def test_one_needless_operator_fails(
    counted: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    velocity = DiffusionDecoder.velocity
    monkeypatch.setattr(DiffusionDecoder, "velocity", lambda *given: velocity(*given) + 0)
    before, after = store(tmp_path / "a.json", counted), store(tmp_path / "b.json", measure())
    assert main(["compare", before, after]) == 1
    printed = capsys.readouterr().out
    more = [line.split()[1:3] for line in printed.splitlines() if line.endswith("MORE")]
    assert more == [["denoiser", "operators"], ["denoiser", "bytes"]]
    assert "stage denoiser: aten.add.Tensor" in printed and f"counts --out {before}" in printed
    assert main(["compare", before, after, "--threshold", "0.01"]) == 0  # 6 of 1319
    assert main(["compare", after, before]) == 0  # less is no failure
    assert "less" in capsys.readouterr().out


def test_a_denoiser_that_runs_twice_fails(
    counted: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    denoise = DiffusionDecoder.denoise

    def twice(*given: Any, **named: Any) -> torch.Tensor:
        denoise(*given, **named)
        return denoise(*given, **named)

    monkeypatch.setattr(DiffusionDecoder, "denoise", twice)
    changed = measure()
    assert changed["stages"]["denoiser"]["flops"] == 2 * counted["stages"]["denoiser"]["flops"]
    before, after = store(tmp_path / "a.json", counted), store(tmp_path / "b.json", changed)
    assert main(["compare", before, after]) == 1
    assert "+100.00%  MORE" in capsys.readouterr().out
    # On another minor version of torch operations are still gated, and the rest is said to be not.
    changed["torch"] = "2.99"
    assert main(["compare", before, store(tmp_path / "b.json", changed)]) == 1
    printed = capsys.readouterr().out
    assert "operators and bytes are not compared: torch" in printed and "stage denoiser operators" not in printed


def test_counting_by_hand() -> None:
    x = torch.ones(10, 4)
    with counting() as counter:
        y = x + x  # 160 bytes
        y.add_(1)  # in place
        z = y.view(4, 10)  # a view
        del y
        w = z + 1  # 160: two alive
        del z
        v = w.sum()  # 4: the first is gone
    assert v.item() == 160 and counter.operators == 5
    assert counter.bytes == 324 and counter.peak == 320
    assert counter.by_name["aten.add.Tensor"] == 2
    with counting_flops() as flops:
        x @ x.T
    assert flops.get_total_flops() == 2 * 10 * 4 * 10


def test_refusals(counted: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = store(tmp_path / "a.json", counted)
    latency = store(tmp_path / "l.json", {"kind": "latency", "format": 1})
    other = store(tmp_path / "o.json", {**counted, "request": {**counted["request"], "steps": 4}})
    short = {**counted, "stages": {k: v for k, v in counted["stages"].items() if k != "vae"}}
    without = store(tmp_path / "s.json", short)
    torn = store(tmp_path / "t.json", {"kind": "counts", "format": 1})
    newer = store(tmp_path / "n.json", {**counted, "format": 9})
    for second, text in (
        (latency, "two results of one kind"),
        (other, "different requests"),
        (without, "lacks stages vae"),
        (torn, "lacks graphs"),
        (newer, "result format 9"),
    ):
        assert main(["compare", good, second]) == 2
        error = capsys.readouterr().err
        assert text in error and error.count("\n") == 1
    assert main(["compare", latency, good]) == 2
    assert main(["compare", good, good, "--threshold", "-1"]) == 2
    assert main(["counts", "--out", "c.txt"]) == 2
    assert main(["counts", str(tmp_path / "none")]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_no_bundle_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(command, "count", lambda *_: {})  # the stages are not asked about
    assert measure(bundle=tmp_path)["graphs"] == {}
    assert "graphs are not counted" in capsys.readouterr().err


def test_an_installation_lacks_the_tests_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "MODEL", tmp_path / "none")
    assert main(["counts"]) == 2
    error = capsys.readouterr().err
    assert "give a folder, or demo" in error and error.count("\n") == 1
