"""The GPU suite end to end at toy size on a CPU, and its rules: whatever fails or is wrong is recorded and marked."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mindomni_rt.benchmarks import cli
from mindomni_rt.benchmarks.gpu import kernels, suite
from mindomni_rt.benchmarks.gpu.kernels import Case, run_case
from mindomni_rt.benchmarks.gpu.report import TARGETS, eager_request, markdown
from mindomni_rt.benchmarks.measure import Meter, Record
from mindomni_rt.benchmarks.results import FOLDER, problems
from mindomni_rt.judgement import judged

TOY = ["--device", "cpu", "--preset", "toy"]


def main(arguments: list[str]) -> int:
    return cli.main(["gpu", *arguments])


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, str]:
    folder = tmp_path_factory.mktemp("results")
    assert main([*TOY, "--minutes", "30", "--out", str(folder)]) == 0
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text()), path.with_suffix(".md").read_text()


def test_every_section_ran(report: tuple[dict, str]) -> None:
    data, table = report
    sections = data["sections"]
    assert not [k for k, v in sections.items() if "failed" in v or "skipped" in v]
    assert all(case["right"] and case["seconds"]["ours"] > 0 for case in sections["kernels"]["cases"])
    assert len(sections["kernels"]["cases"]) == 14 and data["wall_s"] < 60
    for name in ("ours 96", "eager 96", "decoder=fp8"):
        assert sections[name]["step_s"] > 0
    assert sections["diffusers"]["pairs"]["guided step"]["ratio"] > 0
    assert list(sections)[:3] == ["ceilings", "eager 96", "eager 64"] and not problems(data)
    assert "## Not measured" not in table and table.count("not yet measured") == len(TARGETS)


def test_ours_and_the_baselines_compute_the_same(report: tuple[dict, str]) -> None:
    """float32: the masked, concatenating formulation and transformers' greedy text are ours."""
    sections = report[0]["sections"]
    for side in (96, 64):
        assert sections[f"velocity {side}"]["error"] < 1e-5 and sections[f"velocity {side}"]["right"]
    assert sections["hidden states"]["error"] < 1e-5
    assert sections["transformers"]["tokens_equal"] and sections["transformers"]["equal_tokens"] == 8
    assert len(sections["decoding"]["tokens"]) == 8 and sections["diffusers"]["agrees"]
    assert 1e-4 < sections["decoder=int8"]["error"] < sections["decoder=fp8"]["error"] < 0.05


def test_a_budget_swaps_parts(report: tuple[dict, str]) -> None:
    data, table = report
    (found,) = (s for name, s in data["sections"].items() if name.startswith("budget "))
    assert found["under"] and found["resident"] == ["language"] and found["loads"] >= 6
    assert "## Budgets" in table


def test_sweep(tmp_path: Path) -> None:
    assert main([*TOY, "--only", "sweep", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    sections = json.loads(path.read_text())["sections"]
    assert list(sections) == ["sweep"]  # and nothing else that was not asked for
    found = sections["sweep"]
    for name in ("segment_attention", "linear8_int8", "gemv", "int4_gemv"):
        assert found[name]["best"][0]["seconds"] > 0 and found[name]["refused"] == 0


def test_sixteen_and_eight_bits_have_a_baseline_that_rounds_alike() -> None:
    """What a GPU runs at full size, here at toy size in bfloat16: distances from float32, ours and the baseline's."""
    preset = dataclasses.replace(suite.presets("toy"), dtype="bfloat16", sides=(64,))
    found = suite.Suite(preset, torch.device("cpu"), 30, lambda: None)
    found.run(["correctness"])
    found.record.section(found.meter, "decoder=int8", 0, lambda: found.precision("decoder=int8"))
    for name in ("velocity 64", "hidden states", "decoder=int8"):
        judgement = found.record.data[name]
        assert judgement["right"], (name, judgement)
        assert 1e-3 < judgement["error"] < 0.1 and 1e-3 < judgement["baseline_error"] < 0.1
    assert found.record.data["decoder=int8"]["step_s"] > 0


def test_a_time_is_kept_where_the_check_after_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    found = suite.Suite(suite.presets("toy"), torch.device("cpu"), 30, lambda: None)
    found._exact[64] = torch.ones(1)

    def broken(*_: object) -> float:
        raise RuntimeError("no memory")

    monkeypatch.setattr(found, "distance", broken)
    monkeypatch.setattr(found, "step", lambda *_: {"step_s": 1.0})
    record = found.record.section(found.meter, "decoder=int8", 0, lambda: found.precision("decoder=int8"))
    assert record["step_s"] == 1.0 and record["failed"] == "RuntimeError: no memory"


def toy(*parts: str, **more: Any) -> suite.Suite:
    """A suite of one small picture, after it ran some parts."""
    preset = dataclasses.replace(suite.presets("toy"), sides=(64,))
    found = suite.Suite(preset, torch.device("cpu"), 30, more.get("store", lambda: None))
    found.run(list(parts))
    return found


def test_a_velocity_that_is_too_far_is_marked_and_the_step_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The headline figure does not depend on the judgement."""
    monkeypatch.setattr(suite.Suite, "distance", lambda *_: 0.5)
    sections = toy("ceilings", "correctness", "step").record.data
    assert sections["velocity 64"]["right"] is False and sections["velocity 64"]["error"] == 0.5
    assert sections["ours 64"]["step_s"] > 0 and sections["eager 64"]["step_s"] > 0
    assert suite.missed(sections["velocity 64"]) and not suite.missed(sections["ours 64"])
    machine = {"gpu": None, "cpu": "x", "versions": {}}
    table = markdown({"machine": machine, "sections": sections, "preset": "toy", "date": "", "wall_s": 1})
    assert "| velocity 64 | 0.5 | – | 1e-05 | NO |" in table and "| guided step 64² |" in table


@pytest.mark.parametrize(("reserved", "under"), [(0.9, True), (1.1, False)])
def test_a_budget_counts_what_is_reserved(monkeypatch: pytest.MonkeyPatch, reserved: float, under: bool) -> None:
    """Pools of graphs are no tensors: `max_memory_allocated` leaves them out."""
    budget = toy().budgets()[0]
    peaks = {"peak_bytes": budget // 2, "reserved_bytes": int(reserved * budget)}
    monkeypatch.setattr(suite.Meter, "peak", lambda self: dict(peaks))
    found = toy().budget(budget)
    assert found["under"] is under and found["reserved_bytes"] == peaks["reserved_bytes"]


def test_parts_run_in_order_of_value_each_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    value = ["correctness", "step", "tokens", "request", "precisions", "baselines", "sweep"]
    assert [name for name in suite.PARTS if name in value] == value
    assert all(0 < needs < limit <= 600 for needs, limit, _ in suite.PARTS.values())
    parts = {
        "slow": (0.0, 0.2, lambda _: {"sleeps": lambda: time.sleep(30)}),
        "long": (10_000.0, 20_000.0, lambda _: {"too long": dict}),
        "last": (0.0, 9.0, lambda s: {"quick": lambda: {"left": s.meter.left()}}),
    }
    monkeypatch.setattr(suite, "PARTS", parts)
    found, began = toy(), time.monotonic()
    found.cuda = True  # limits are of a GPU
    found.run(list(parts))
    data = found.record.data
    assert data["sleeps"]["failed"].startswith("TimeoutError") and time.monotonic() - began < 20
    assert data["too long"]["skipped"].startswith("10000 s needed") and 0 < data["quick"]["left"] <= 9


def test_everything_runs_on_the_device_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels without a backend too: Triton launches on the thread's current device."""
    log: list[str] = []

    @contextlib.contextmanager
    def current(device: str) -> Iterator[None]:
        log.append(device)
        yield
        log.append("left")

    monkeypatch.setattr(suite, "working_on", current)
    monkeypatch.setattr(suite.Suite, "run", lambda self, parts: log.append("ran"))
    main([*TOY, "--only", "kernels"])
    assert log == ["cpu", "ran", "left"]


DAMAGE: list[tuple[str, Any, str]] = [
    ("date", "yesterday", "date: expected text of the form"),
    ("preset", "huge", "preset: expected text of the form full|toy, found 'huge'"),
    ("command", None, "lacks command"),
    ("wall_s", "long", "wall_s: expected int or float, found 'long'"),
    ("machine.gpu", 7, "machine.gpu: expected str or null, found 7"),
    ("machine.sm", "90", "machine.sm: expected int, found '90'"),
    ("model.config.language", None, "model configuration is incomplete"),
    ("sections", {}, "sections: expected an object that is not empty"),
    ("sections.warp drive", {"step_s": 1.0}, "sections.warp drive: no part of such a result"),
    ("sections.ours 1e9", {"step_s": 1.0}, "sections.ours 1e9: no part of such a result"),
    ("sections.ours 96.step_s", None, "lacks sections.ours 96.step_s"),
    ("sections.ours 96.step_s", float("nan"), "sections.ours 96.step_s: nan is no finite number"),
    ("sections.ours 96.step_s", True, "sections.ours 96.step_s: expected int or float, found True"),
    ("sections.ours 96.step_runs_s", [], "sections.ours 96.step_runs_s: expected a list that is not empty"),
    ("sections.velocity 96.right", "yes", "sections.velocity 96.right: expected bool, found 'yes'"),
    ("sections.request.stages_s.vae", "fast", "sections.request.stages_s.vae: expected int or float"),
    ("sections.kernels.cases.0.right", None, "lacks sections.kernels.cases.0.right"),
    ("sections.kernels.cases.0.seconds.ours", [], "sections.kernels.cases.0.seconds.ours: expected"),
    ("sections.diffusers.pairs.guided step.ratio", float("inf"), "pairs.guided step.ratio: inf is no finite number"),
    ("sections.decoding.failed", 3, "sections.decoding.failed: expected str, found 3"),
]


@pytest.mark.parametrize(("path", "value", "expected"), DAMAGE, ids=[f"{p}={v!r:.20}" for p, v, _ in DAMAGE])
def test_damage_is_named(report: tuple[dict, str], path: str, value: Any, expected: str) -> None:
    """None: the field is taken out."""
    data = copy.deepcopy(report[0])
    place: Any = data
    *way, last = path.split(".")
    for key in way:
        place = place[int(key) if isinstance(place, list) else key]
    if value is None:
        del place[last]
    else:
        place[last] = value
    found = problems(data)
    assert any(line.startswith(expected) or expected in line for line in found) and len(found) <= 2, found


def test_every_part_has_a_shape(report: tuple[dict, str]) -> None:
    """An empty part is named, and so is one that is none, unless it says why it has nothing."""
    for name in report[0]["sections"]:
        for emptied in ({}, []):
            data = copy.deepcopy(report[0])
            data["sections"][name] = emptied
            assert any(f"sections.{name}" in line for line in problems(data)), name
        data["sections"][name] = {"failed": "RuntimeError: no kernel"}
        assert not problems(data)


def test_the_file_is_checked_by_the_command(
    report: tuple[dict, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r.json"
    path.write_text(json.dumps(report[0]))
    assert cli.main(["check", str(path)]) == 0
    path.write_text(json.dumps({**report[0], "sections": {**report[0]["sections"], "magic": {"step_s": 1e-9}}}))
    assert cli.main(["check", str(path)]) == 1
    assert "sections.magic: no part of such a result" in capsys.readouterr().out


def test_eager_request_by_hand() -> None:
    sections = {
        "request": {"side": 8, "stages_s": {"language": 1.0, "denoiser": 2.0, "vae": 0.5}},
        "eager 8": {"step_s": 0.3},
        "ours 8": {"step_s": 0.1},
        "transformers": {"pairs": {"decoded token": {"theirs_s": [0.01, 0.04, 0.09]}}},
        "decoding": {"token_s": 0.01},
    }
    assert eager_request(sections) == pytest.approx(0.5 + 6.0 + 4.0)
    assert eager_request({}) is None


def case(error: float, bound: float = 0.1, baseline: float | None = None, **more: object) -> Case:
    """A case whose output is that far from 1, and whose baseline's is."""
    variants = {"ours": lambda: torch.tensor([1.0 + error])}
    if baseline is not None:
        variants["rival"] = lambda: torch.tensor([1.0 + baseline])
    exact = torch.ones(1)
    name = "" if baseline is None else "rival"
    return Case(exact=lambda: exact, bound=bound, variants=variants, baseline=name, **more)  # type: ignore[arg-type]


def test_a_wrong_kernel_is_timed_and_marked() -> None:
    meter = Meter(torch.device("cpu"), runs=2)
    found = run_case("x", lambda: case(0.5, flops=1.0), meter, {})
    assert not found["right"] and found["error"] == pytest.approx(0.5) and found["seconds"]["ours"] > 0
    nan = run_case("x", lambda: case(float("nan")), meter, {})
    assert not nan["right"] and nan["error"] is None and nan["seconds"]["ours"] > 0

    def broken() -> Case:
        raise RuntimeError("no such kernel")

    assert "no such kernel" in run_case("x", broken, meter, {})["failed"]
    right = run_case("x", lambda: case(0.0, flops=1.0), meter, {})
    assert right["right"] and right["seconds"]["ours"] > 0
    assert not run_case("x", lambda: case(0.0125, baseline=0.01), meter, {})["right"]
    assert run_case("x", lambda: case(0.0115, baseline=0.01), meter, {})["right"]


def test_a_result_is_judged_by_its_own_and_the_baselines_distance() -> None:
    assert judged(0.012, 0.1, 0.01)["right"] and not judged(0.0121, 0.1, 0.01)["right"]
    assert not judged(0.11, 0.1, 0.1)["right"] and judged(0.05, 0.1)["right"]
    assert not judged(float("nan"), 0.1)["right"] and not judged(float("inf"), 0.1, 1.0)["right"]


def test_a_kernel_that_cannot_be_made_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As quantizing to fp8 on SM 80 to 87: the compiler raises while the case is made."""

    def refused(*_: object) -> None:
        raise ValueError("type fp8e4nv not supported in this architecture")

    monkeypatch.setattr(kernels, "quantize_rows", refused)
    assert main([*TOY, "--only", "kernels,sweep", "--out", str(tmp_path)]) == 1
    (path,) = tmp_path.glob("*.json")
    sections = json.loads(path.read_text())["sections"]
    assert "fp8e4nv not supported" in sections["sweep"]["linear8_int8"]["failed"] and sections["sweep"]["gemv"]["best"]
    cases = {c["name"]: c for c in sections["kernels"]["cases"]}
    assert len(cases) == 14 and [n for n, c in cases.items() if "failed" in c] == ["linear8_int8", "linear8_fp8"]
    assert "fp8e4nv not supported" in cases["linear8_fp8"]["failed"]


def test_the_result_is_stored_after_each_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(suite.Suite, "tokens", killed)
    assert main([*TOY, "--only", "tokens,ceilings", "--out", str(tmp_path)]) == 130
    (path,) = tmp_path.glob("*.json")
    data = json.loads(path.read_text())
    assert data["sections"]["ceilings"]["matmul"] > 0 and not problems(data)
    assert "Ceilings of this run" in path.with_suffix(".md").read_text()


def test_toy_sizes_on_a_cpu_leave_the_results_folder_alone(capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(FOLDER.iterdir())
    assert main([*TOY, "--only", "ceilings"]) == 0
    assert "Ceilings of this run" in capsys.readouterr().out and sorted(FOLDER.iterdir()) == before


def test_what_does_not_fit_into_the_minutes_is_left_out(tmp_path: Path) -> None:
    assert main([*TOY, "--minutes", "0.0001", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    sections = json.loads(path.read_text())["sections"]
    assert len(sections) > 10 and all("skipped" in section for section in sections.values())


def test_a_failing_section_leaves_the_others() -> None:
    meter, record = Meter(torch.device("cpu")), Record()

    def fails() -> None:
        raise ValueError("broken")

    stored: list[int] = []
    record.store = lambda: stored.append(len(record.data))
    record.section(meter, "a", 0, fails)
    assert record.section(meter, "b", 0, lambda: {"x": 1})["x"] == 1
    meter.deadline = 0
    record.section(meter, "c", 1, lambda: {"x": 1})
    assert stored == [1, 2]
    assert record.data["a"]["failed"] == "ValueError: broken" and "skipped" in record.data["c"]
    machine = {"gpu": None, "cpu": "x", "versions": {}, "commit": None}
    table = markdown({"machine": machine, "sections": record.data, "preset": "toy", "date": "", "wall_s": 1})
    assert "| a | ValueError: broken |" in table and "| c | " in table


def test_no_gpu_is_said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("asks what happens where there is no CUDA device")
    assert main(["--out", str(tmp_path)]) == 2
    assert "no CUDA device" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_part_has_a_time_limit() -> None:
    meter, record = Meter(torch.device("cpu")), Record()
    record.data["a"] = {"cases": [1]}  # what it stored before
    began = time.monotonic()
    record.section(meter, "a", 0, lambda: time.sleep(30), limit=0.2)
    assert time.monotonic() - began < 10
    assert record.data["a"]["failed"].startswith("TimeoutError: stopped after") and record.data["a"]["cases"] == [1]
    assert record.section(meter, "b", 0, lambda: {"left": meter.left()}, limit=60)["left"] <= 60
    assert meter.left() == float("inf")


@pytest.mark.parametrize(
    "more", [["--only", "steps"], ["--minutes", "0"], ["--device", "tpu"], ["--sweep"], ["--preset", "x"]]
)
def test_mistakes_are_one_line(more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TOY, *more]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
