"""The GPU suite end to end at toy size on a CPU, and its rule: a wrong kernel is not timed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mindomni_rt.benchmarks.gpu.kernels import Case, run_case
from mindomni_rt.benchmarks.gpu.measure import Meter, Record
from mindomni_rt.benchmarks.gpu.report import TARGETS, eager_request, markdown
from mindomni_rt.benchmarks.gpu.suite import main


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, str]:
    folder = tmp_path_factory.mktemp("results")
    assert main(["--device", "cpu", "--preset", "toy", "--out", str(folder)]) == 0
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text()), path.with_suffix(".md").read_text()


def test_every_section_ran(report: tuple[dict, str]) -> None:
    data, table = report
    sections = data["sections"]
    assert not [k for k, v in sections.items() if "failed" in v or "skipped" in v]
    assert all(case["right"] and case["seconds"]["ours"] > 0 for case in sections["kernels"]["cases"])
    assert len(sections["kernels"]["cases"]) == 14 and data["wall_s"] < 60
    for name in ("ours 96", "eager 96", "decoder=fp8", "diffusers"):
        assert sections[name]["step_s"] > 0
    assert "## Not measured" not in table and table.count("not yet measured") == len(TARGETS)


def test_ours_and_the_baselines_compute_the_same(report: tuple[dict, str]) -> None:
    """float32: the masked, concatenating formulation and transformers' greedy text are ours."""
    sections = report[0]["sections"]
    for side in (96, 64):
        assert sections[f"ours {side}"]["error_to_eager"] < 1e-5
    assert sections["decoding"]["tokens"] == sections["transformers"]["eager"]["tokens"]
    assert sections["decoding"]["tokens_as_transformers"] == 8
    assert 1e-4 < sections["decoder=int8"]["error_to_eager"] < sections["decoder=fp8"]["error_to_eager"] < 0.05


def test_a_budget_swaps_parts(report: tuple[dict, str]) -> None:
    data, table = report
    (found,) = (s for name, s in data["sections"].items() if name.startswith("budget "))
    assert found["under"] and found["resident"] == ["language"] and found["loads"] >= 6
    assert "## Budgets" in table


def test_sweep(tmp_path: Path) -> None:
    assert main(["--device", "cpu", "--preset", "toy", "--sweep", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    found = json.loads(path.read_text())["sections"]["sweep"]
    for name in ("segment_attention", "linear8_int8", "gemv", "int4_gemv"):
        assert found[name]["best"][0]["seconds"] > 0 and found[name]["refused"] == 0


def test_eager_request_by_hand() -> None:
    sections = {
        "request": {"side": 8, "stages_s": {"language": 1.0, "denoiser": 2.0, "vae": 0.5}},
        "eager 8": {"step_s": 0.3},
        "ours 8": {"step_s": 0.1},
        "transformers": {"eager": {"token_s": 0.04}},
        "decoding": {"token_s": 0.01},
    }
    assert eager_request(sections) == pytest.approx(0.5 + 6.0 + 4.0)
    assert eager_request({}) is None


def test_a_wrong_kernel_is_not_timed() -> None:
    ran = []

    def variant() -> None:
        ran.append(1)

    meter = Meter(torch.device("cpu"), runs=2)
    case = Case(name="x", check=lambda: 0.5, bound=0.1, variants={"ours": variant}, flops=1.0)
    found = run_case(case, meter, {})
    assert not found["right"] and "seconds" not in found and not ran
    nan = run_case(Case(name="x", check=lambda: float("nan"), bound=0.1, variants={"ours": variant}), meter, {})
    assert not nan["right"] and not ran

    def broken() -> float:
        raise RuntimeError("no such kernel")

    assert "no such kernel" in run_case(Case(name="x", check=broken, bound=1, variants={}), meter, {})["failed"]
    right = run_case(Case(name="x", check=lambda: 0.0, bound=0.1, variants={"ours": variant}, flops=1.0), meter, {})
    assert right["seconds"]["ours"] > 0 and ran


def test_a_failing_section_leaves_the_others() -> None:
    meter, record = Meter(torch.device("cpu")), Record()

    def fails() -> None:
        raise ValueError("broken")

    record.section(meter, "a", 0, fails)
    assert record.section(meter, "b", 0, lambda: {"x": 1})["x"] == 1
    meter.deadline = 0
    record.section(meter, "c", 1, lambda: {"x": 1})
    assert record.data["a"]["failed"] == "ValueError: broken" and "skipped" in record.data["c"]
    machine = {"gpu": None, "cpu": "x", "versions": {}, "commit": None}
    table = markdown({"machine": machine, "sections": record.data, "preset": "toy", "date": "", "wall_s": 1})
    assert "- a: ValueError: broken" in table and "- c: " in table


def test_no_gpu_is_said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("asks what happens where there is no CUDA device")
    assert main(["--out", str(tmp_path)]) == 2
    assert "no CUDA device" in capsys.readouterr().err and not list(tmp_path.iterdir())
