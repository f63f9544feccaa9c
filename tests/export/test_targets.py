"""Which precisions a target takes, and plans: refusals come by name, before any work."""

from __future__ import annotations

from pathlib import Path

import pytest

from mindomni_rt import BadRequestError, OutOfMemoryError, UnsupportedDeviceError
from mindomni_rt.devices.table import find_device
from mindomni_rt.export.cli import main
from mindomni_rt.export.plan import plan_build, report
from mindomni_rt.export.targets import ARCHITECTURES, PRECISIONS, QUANTIZED, choose, parse_target, stages_of

# NVIDIA's own tables of types: FP8 from Ada and Hopper on, FP4 from Blackwell on, BF16 from Ampere on.
FP8 = {"sm_89", "sm_90", "sm_100", "sm_110", "sm_120", "sm_121"}
FP4 = {"sm_100", "sm_110", "sm_120", "sm_121"}


@pytest.mark.parametrize("sm", ARCHITECTURES)
def test_types_by_architecture(sm: str) -> None:
    has = set(ARCHITECTURES[sm].precisions)
    assert ("fp8" in has) == (sm in FP8) and ("nvfp4" in has) == (sm in FP4) and ("bf16" in has) == (sm != "sm_75")
    for name in set(PRECISIONS) - has - {"mixed"}:
        with pytest.raises(UnsupportedDeviceError, match=f"precision {name} on {sm}"):
            choose(parse_target(sm), name)


@pytest.mark.parametrize("sm", ARCHITECTURES)
def test_defaults_are_buildable_and_have_reasons(sm: str) -> None:
    choice = choose(parse_target(sm), None)
    architecture = ARCHITECTURES[sm]
    assert all(choice.stages[s] in architecture.precisions for s in QUANTIZED) and architecture.reason
    assert choice.dtype == ("float16" if sm == "sm_75" else "bfloat16")


def test_runtimes() -> None:
    """TensorRT-RTX 1.7 lists RTX GPUs and DGX Spark; the others need TensorRT."""
    rtx = {sm for sm, a in ARCHITECTURES.items() if a.runtime == "tensorrt_rtx"}
    assert rtx == {"sm_75", "sm_86", "sm_89", "sm_120", "sm_121"}


def test_products() -> None:
    assert parse_target("rtx4090").sms == ("sm_89",) and parse_target("dgx-spark").sms == ("sm_121",)
    assert parse_target("RTX3060, sm_89").sms == ("sm_86", "sm_89")
    assert parse_target("cpu").runtime == "onnx"
    for wrong in ("sm_42", "rtx9999", "", ","):
        with pytest.raises(UnsupportedDeviceError):
            parse_target(wrong)
    for wrong in ("cup", "gpu"):  # the nearest device would be a guess
        with pytest.raises(UnsupportedDeviceError, match="expected cpu, an architecture"):
            parse_target(wrong)
    with pytest.raises(UnsupportedDeviceError, match="one runtime"):
        parse_target("sm_89,agx-orin")


def test_several_architectures_share_what_all_have() -> None:
    choice = choose(parse_target("sm_86,sm_120"), None)
    assert choice.stages["denoiser"] == "int8" and choice.stages["language"] == "int4"
    with pytest.raises(UnsupportedDeviceError, match="fp8 on sm_86"):
        choose(parse_target("sm_86,sm_89"), "fp8")


def test_overrides() -> None:
    target = parse_target("sm_89")
    choice = choose(target, "bf16", stages_of(["prefix=fp8", "denoiser=fp8"]))
    assert choice.stages["denoiser"] == "fp8" and choice.stages["language"] == "bf16"
    for stages, message in (
        (["denoiser=fp8"], "prefix and denoiser"),
        (["upscaler=fp8"], "stage 'upscaler'"),
        (["vision=int8"], "not quantized"),
        (["denoiser"], "STAGE=PRECISION"),
        (["language=fp16"], "share one type"),
        (["language=mixed"], "for stage vae"),
        (["language=int3"], "precision 'int3'"),
    ):
        with pytest.raises(BadRequestError, match=message):
            choose(target, "bf16", stages_of(stages))


@pytest.mark.parametrize("precision", ["fp8", "nvfp4", "bf16"])
def test_onnxruntime_on_the_cpu(precision: str) -> None:
    with pytest.raises(UnsupportedDeviceError, match="on cpu"):
        choose(parse_target("cpu"), precision)


def test_plan_of_the_published_model() -> None:
    """7.6 G language weights (0.5 G of them embeddings) and 3.8 G in the decoder, 2 bytes each."""
    plan = plan_build("h200", precision="bf16")
    weights = {s.stage: s.weights for s in plan.memory.stages}
    assert weights["language"] == pytest.approx(7.07e9 * 2 + 0.545e9 * 2, rel=0.02)
    assert weights["denoiser"] == weights["prefix"] == pytest.approx(3.75e9 * 2, rel=0.03)
    assert not plan.memory.moved and plan.memory.peak < find_device("h200").bytes
    assert "predictions" in report(plan)


def test_a_plan_within_a_budget_swaps() -> None:
    plan = plan_build("rtx4060", budget="8GiB")
    assert plan.memory.peak <= 8 * 2**30 and plan.memory.moved
    assert "language" not in plan.memory.resident


SMALL = Path(__file__).parents[2] / "assets" / "shapes-world"


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ([], "1024x1024, 50 steps"),  # the published model's
        (["--checkpoint", str(SMALL)], "96x96, 10 steps"),
        (["--checkpoint", str(SMALL), "--size", "128x64"], "128x64, 10 steps"),
        (["--size", "512"], "512x512, 50 steps"),
    ],
)
def test_a_plan_is_of_the_models_own_size(options: list[str], shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--device", "rtx4090", "--precision", "int4", *options]) == 0
    assert f"\n{shown}," in capsys.readouterr().out


def test_a_plan_that_cannot_fit_names_what_does() -> None:
    with pytest.raises(OutOfMemoryError, match=r"stage language alone needs .*this fits: --size"):
        plan_build("orin-nano", precision="fp16")
    with pytest.raises(OutOfMemoryError, match="nothing that can be built"):
        plan_build("rtx4060", budget="1GB")
    for budget in ("", "-1GB", "lots"):
        with pytest.raises(BadRequestError, match="memory"):
            plan_build("rtx4060", budget=budget)
