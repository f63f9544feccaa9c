"""Latency results, their comparison, the command line. No time is asserted: only what is done with times."""

from __future__ import annotations

import json
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import PARITY
from PIL import Image

from mindomni_rt.benchmarks.cli import main
from mindomni_rt.benchmarks.compare import change
from mindomni_rt.benchmarks.latency.cold import cold_starts, describe_cold, language_files, read_seconds
from mindomni_rt.benchmarks.latency.command import percentiles
from mindomni_rt.benchmarks.machine import describe_machine
from mindomni_rt.benchmarks.results import read_result

BUNDLE = Path(__file__).parents[2] / "assets" / "shapes-world-bundle"
SMALL = ["--size", "32", "--steps", "2", "--max-new-tokens", "3", "--runs", "3", "--device", "cpu", "--no-cold-start"]

TINY = {"height": 32, "width": 32, "num_inference_steps": 2, "max_new_tokens": 3, "output": "numpy"}


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("latency") / "a.json"
    assert main(["latency", str(PARITY), *SMALL, "--out", str(out)]) == 0
    return out


def test_a_result_holds_every_stage_of_every_run(result: Path) -> None:
    read = read_result(result)
    for stage in ("language", "connector", "prefix", "denoiser", "vae", "total"):
        assert len(read.samples(stage)) == 3 and all(s > 0 for s in read.samples(stage))
    parts = [sum(r[s] for s in ("language", "connector", "prefix", "denoiser", "vae")) for r in read.data["runs"]]
    assert all(p <= r["total"] for p, r in zip(parts, read.data["runs"], strict=True))
    assert read.workload.steps == 2 and read.data["energy"] == "not available"
    assert read.data["peak_host_bytes"] > 50e6
    text = result.with_suffix(".md").read_text()
    assert "| denoiser |" in text and "n = 3" in text and "1 warm-up" in text
    for figure in (
        "| first thinking token |",
        "| denoising step |",
        "| decoding |",
        "| peak device memory | not available",
    ):
        assert figure in text
    assert "p50 s | p90 s | p99 s" in text and read.data["commit"] and read.data["versions"]["torch"]
    assert set(read.data["clocks"]) == {"before", "after"} and "Clocks" in text
    with Image.open(result.with_suffix(".png")) as plot:
        assert plot.width > 500
    assert str(Path.home()) not in result.read_text()


def test_cold_start_runs_in_another_process(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["latency", str(BUNDLE), *SMALL[:-1]]) == 0  # onnxruntime is imported sooner than torch
    out = capsys.readouterr().out
    assert all(f"| cold start, {name} | loaded " in out for name in ("first", "second", "from the disk"))
    assert out.count("first token") == 3 and out.count("reading the language model's files alone") == 1
    floors = re.findall(r"^\| (denoiser|total) \| (\S+) .* \| (\S+) \|$", out, re.MULTILINE)
    assert [name for name, *_ in floors] == ["denoiser", "total"]
    assert all(0 < float(floor) <= float(measured) for _, measured, floor in floors)
    assert "floor: ceilings measured in the same run; weights in fp32." in out and "ceilings in this run | copy" in out


def test_percentiles_by_hand() -> None:
    assert percentiles([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx((3.0, 4.6, 4.96))


def test_changes_and_their_intervals() -> None:
    draw = np.random.default_rng(0)
    base = 1 + 0.02 * draw.standard_normal(40)
    slower = change("total", base, 1.2 * (1 + 0.02 * draw.standard_normal(40)))
    assert slower.ratio == pytest.approx(1.2, abs=0.02) and slower.low < slower.ratio < slower.high
    assert slower.worse(0.05) and not slower.worse(0.3) and slower.verdict(0.05) == "SLOWER"
    same = change("total", base, 1 + 0.02 * draw.standard_normal(40))
    assert same.verdict(0.05) == "same" and same.low < 1.02 and same.high > 0.98
    assert change("total", slower_values(base), base).verdict(0.05) == "faster"


def slower_values(base: np.ndarray) -> np.ndarray:
    return base * 1.5


def edited(path: Path, out: Path, factor: float, **more: Any) -> Path:
    data = json.loads(path.read_text())
    for run in data["runs"]:
        for name in run:
            run[name] *= factor
    data |= more
    out.write_text(json.dumps(data))
    return out


def test_compare_exits_with_one_where_it_got_slower(
    result: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Each run's time is that of the first, so that nothing but the factor is left.
    data = json.loads(result.read_text())
    data["runs"] = [data["runs"][0]] * 3
    steady = tmp_path / "steady.json"
    steady.write_text(json.dumps(data))
    assert main(["compare", str(steady), str(steady)]) == 0
    assert main(["compare", str(steady), str(edited(steady, tmp_path / "b.json", 1.5))]) == 1
    assert "SLOWER" in capsys.readouterr().out
    assert main(["compare", str(steady), str(edited(steady, tmp_path / "c.json", 0.5))]) == 0
    assert main(["compare", str(steady), str(edited(steady, tmp_path / "d.json", 1.5)), "--threshold", "1"]) == 0
    other = {**data["workload"], "steps": 3}
    assert main(["compare", str(steady), str(edited(steady, tmp_path / "e.json", 1, workload=other))]) == 2
    assert "different requests" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["latency", "no-such-folder/x/y", *SMALL],
        ["latency", str(PARITY), *SMALL, "--runs", "0"],
        ["latency", str(PARITY), *SMALL, "--size", "33"],
        ["latency", str(PARITY), *SMALL, "--out", "result.txt"],
        ["compare", "none.json", "none.json"],
        ["roofline", "--device", "toaster"],
        ["plan", "--memory-budget", "lots"],
        ["plan", "--memory-budget", "1GB"],
    ],
)
def test_mistakes_are_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") <= 2 and "error: " in error and "Traceback" not in error


def test_broken_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("", "{", "[]", '{"kind": "latency", "format": 99}', '{"kind": "latency", "format": 1}'):
        path = tmp_path / "r.json"
        path.write_text(text)
        assert main(["compare", str(path), str(path)]) == 2
        assert str(path) in capsys.readouterr().err


def test_a_full_disk_says_so_and_keeps_the_old_result(
    result: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = result.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mindomni_rt.files.os.replace", full)
    assert main(["latency", str(PARITY), *SMALL, "--out", str(result)]) == 2
    assert "No space left" in capsys.readouterr().err and result.read_bytes() == before


def test_roofline_and_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["roofline", "--device", "rtx4090", "--plot", str(tmp_path / "r.png")]) == 0
    out = capsys.readouterr().out
    assert "total prediction (s)" in out and (tmp_path / "r.png").exists()
    assert main(["plan", "--memory-budget", "8GiB"]) == 0
    assert "predictions" in capsys.readouterr().out


def test_the_machine_is_told_without_failing() -> None:
    found = describe_machine()
    assert found["cores"].isdigit() and found["cpu"]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks", "latency", str(PARITY), *arguments]


def test_a_failing_cold_start_keeps_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONHOME", str(tmp_path))  # a fresh interpreter finds no library there
    out = tmp_path / "r.json"
    assert main(["latency", str(PARITY), *SMALL[:-1], "--out", str(out)]) == 0
    read = read_result(out)
    assert len(read.samples("total")) == 3
    assert [list(start) for start in read.data["cold_start"]] == [["failed"]] * 3
    text = out.with_suffix(".md").read_text()
    assert "| cold start, first | failed: " in text and "Error" in read.data["cold_start"][0]["failed"]


def test_cold_start_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (start,) = cold_starts(str(BUNDLE), {"device": "cpu"}, {"prompt": "x", **TINY}, times=1)
    assert 0 < start["load"] < start["first_token"] < start["first_image"]
    assert start["load"] <= start["first_token_begun"] < start["first_token"]
    assert f"(begun after {start['first_token_begun']:.2f} s)" in describe_cold(start)
    (plain,) = cold_starts(str(BUNDLE), {"device": "cpu"}, {"prompt": "x", "think": False, **TINY}, times=1)
    assert plain.keys() == {"load", "first_image"}
    (start,) = cold_starts(str(tmp_path / "none"), {"device": "cpu"}, {"prompt": "x", **TINY}, times=1)
    assert "BadCheckpointError" in start["failed"] or "BadRequestError" in start["failed"]
    assert describe_cold(start).startswith("failed: ")


def test_what_a_first_token_has_to_read(tmp_path: Path) -> None:
    """The files of the language model alone, each read whole."""
    assert [p.name for p in language_files(BUNDLE)] == ["language.onnx", "language.data"]
    (shard,) = language_files(PARITY)
    assert shard.parent.name == "mllm" and shard.suffix == ".safetensors"
    assert read_seconds([shard]) > 0
    with pytest.raises(FileNotFoundError):
        read_seconds([tmp_path / "none"])


def test_interrupting_the_cold_start_keeps_the_runs(tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    process = subprocess.Popen(
        command(*SMALL[:-1], "--out", str(out)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        # A shell's background jobs ignore Ctrl-C, and their children with them; this one must not.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stderr is not None
    said = ""
    while "cold start 1 of 3" not in said:
        line = process.stderr.readline()
        assert line, said
        said += line
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in said + rest
    read = read_result(out)
    assert len(read.samples("total")) == 3 and read.data["cold_start"] == [{"failed": "interrupted"}]
    assert "| cold start, first | failed: interrupted |" in out.with_suffix(".md").read_text()


@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process are POSIX")
def test_a_disk_that_fills_up_leaves_nothing_half_written(tmp_path: Path) -> None:
    """The kernel itself refuses the write past 1000 bytes."""
    out = tmp_path / "r.json"
    out.write_text("before")
    done = subprocess.run(
        command(*SMALL, "--out", str(out)), capture_output=True, text=True, timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)),
    )  # fmt: skip
    assert done.returncode == 2 and "could not be written" in done.stderr and "Traceback" not in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"] and out.read_text() == "before"
