"""The full-size dry run against the published sizes, the plan's arithmetic, and the GPU step's own code on a toy."""

from __future__ import annotations

import copy
import dataclasses
import json
import re

import pytest
import torch
from toy import VAE, WORDS

from mindomni_rt.errors import UnsupportedDeviceError
from mindomni_rt.training import fullsize
from mindomni_rt.training.cli import main
from mindomni_rt.training.config import load_config
from mindomni_rt.training.evaluation.ablate import CONFIGS
from mindomni_rt.training.fresh import SPECIAL, fresh_config
from mindomni_rt.training.fullsize import GIB, gpu_step, memory_plan, meta_stage, parameter_table, report


@pytest.fixture(scope="module")
def stages():
    return {name: meta_stage(load_config(CONFIGS / f"{name}-full.toml")) for name in ("pretrain", "sft", "rgpo")}


def trained(stage):
    return sum(t for _, t, _ in parameter_table(stage))


def test_what_trains_at_full_size(stages):
    # Linear 3584 → 3072 with bias, and two Phi-3 layers of 3072² · 4 + 3 · 3072 · 8192 weights and two norms.
    connector = 3584 * 3072 + 3072 + 2 * (4 * 3072**2 + 3 * 3072 * 8192 + 2 * 3072)
    assert trained(stages["pretrain"]) == connector
    # Rank 16 on qkv_proj (3072 → 9216) and o_proj (3072 → 3072) of 32 layers.
    assert trained(stages["sft"]) == connector + 32 * 16 * (3072 + 9216 + 3072 + 3072)
    widths = [(3584, 3584), (3584, 512), (3584, 512), (3584, 3584), (3584, 18944), (3584, 18944), (18944, 3584)]
    assert trained(stages["rgpo"]) == 28 * 64 * sum(a + b for a, b in widths)
    for stage in stages.values():
        assert all(p.is_meta for p in stage.model.parameters())


def test_plan_by_hand(stages):
    stage = stages["pretrain"]
    one, eight = memory_plan(stage, 1), memory_plan(stage, 8)
    count = trained(stage)
    assert one.optimizer == pytest.approx(8 * count / GIB)
    assert eight.optimizer == pytest.approx(one.optimizer / 8)
    assert one.gathered == 0 and eight.gathered > 0
    frozen = sum(p.numel() for p in stage.model.parameters()) - count
    assert one.frozen == pytest.approx(2 * frozen / GIB)
    assert eight.total < one.total


def test_recomputing_activations_is_planned(stages):
    stage = stages["pretrain"]
    kept = memory_plan(stage, 8).activations
    stage.config, before = dataclasses.replace(stage.config, recompute=True), stage.config
    try:
        assert memory_plan(stage, 8).activations < kept / 5
    finally:
        stage.config = before


def test_report_names_what_trains():
    text = report(load_config(CONFIGS / "rgpo-full.toml"), gpus=[1, 8])
    assert "161.5 M parameters train" in text
    assert "language.layers.N.self_attn.q_proj.lora_A.default.weight" in text
    assert re.search(r"frozen:\n(.*\n)*\s+[\d,]+  vae\.\*", text)
    assert "predicted" in text


def test_gpu_step_needs_a_gpu_and_says_so():
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    config = load_config(CONFIGS / "pretrain-full.toml")
    with pytest.raises(UnsupportedDeviceError, match="needs a CUDA device"):
        gpu_step(config, config)


SETTINGS = ["data.image_size=32", "optim.batch=2", "precision=bf16", "data.cache_latents=''"]
SMALL = ["optim.batch=1", "rgpo.max_new_tokens=4", "rgpo.image_steps=2", "rgpo.group=2", "lora.rank=2"]


def toy_step(store=lambda results: None):
    """A toy's steps on the CPU, in bf16."""
    pretrain = load_config(CONFIGS / "pretrain-full.toml", SETTINGS)
    rgpo = load_config(CONFIGS / "rgpo-full.toml", [*SETTINGS, *SMALL])
    return gpu_step(pretrain, rgpo, fresh_config(len(SPECIAL) + len(WORDS) + 20, VAE, width=32), "cpu", store)


def test_gpu_step_runs_on_a_toy():
    stored = []
    found = toy_step(lambda results: stored.append(copy.deepcopy(results)))
    assert set(found) == {"pretrain", "rgpo"}
    for row in found.values():
        assert row["seconds"] > 0 and row["loss"] == row["loss"]
        assert row["right"] and 1e-4 < row["error"] < row["bound"], row
    # After each part: the time before the reference in float32, which may not fit.
    assert [{k: "right" in v for k, v in results.items()} for results in stored] == [
        {"pretrain": False}, {"pretrain": True}, {"pretrain": True, "rgpo": False}, {"pretrain": True, "rgpo": True}
    ]  # fmt: skip
    assert all("seconds" in row for results in stored for row in results.values())


def test_a_wrong_gradient_is_marked_and_timed(monkeypatch):
    """Products that are wrong in 16 bits alone."""
    real = torch.nn.functional.linear

    def wrong(x, weight, bias=None):
        rough = weight + weight.roll(1, 0) if torch.is_autocast_enabled("cpu") else weight
        return real(x, rough, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", wrong)
    found = toy_step()["pretrain"]
    assert found["right"] is False and found["error"] > found["bound"] and found["seconds"] > 0


@pytest.mark.parametrize("where", ["_step", "_judgement"])
def test_a_stage_that_fails_leaves_the_other(where, monkeypatch):
    real = getattr(fullsize, where)

    def fails_once(stage, *rest):
        if stage.name == "pretrain":
            raise torch.OutOfMemoryError("Tried to allocate 9 GiB")
        return real(stage, *rest)

    monkeypatch.setattr(fullsize, where, fails_once)
    found = toy_step()
    assert found["pretrain"]["failed"].startswith("out of memory: ") and found["rgpo"]["right"]
    assert ("seconds" in found["pretrain"]) == (where == "_judgement")


def test_the_command_stores_and_says_what_is_wrong(tmp_path, monkeypatch, capsys):
    def broken(pretrain, rgpo, store):
        store({"pretrain": {"seconds": 1.0}})
        assert json.loads(out.read_text())["result"]["pretrain"]["seconds"] == 1.0
        return {"pretrain": {"seconds": 1.0, "right": False}}

    out = tmp_path / "step.json"
    monkeypatch.setattr(fullsize, "gpu_step", broken)
    assert main(["gpu-step", "--out", str(out)]) == 1
    assert json.loads(capsys.readouterr().out) == {"pretrain": {"seconds": 1.0, "right": False}}


@pytest.mark.gpu
def test_full_size_step_on_a_gpu():
    if not torch.cuda.is_available() or torch.cuda.get_device_properties(0).total_memory < 75 * GIB:
        pytest.skip("needs a CUDA device with 80 GB")
    settings = ["data.image_size=256", "optim.batch=1", "data.cache_latents=''"]
    pretrain = load_config(CONFIGS / "pretrain-full.toml", settings)
    small = ["rgpo.max_new_tokens=8", "rgpo.image_steps=2", "rgpo.group=2"]
    found = gpu_step(pretrain, load_config(CONFIGS / "rgpo-full.toml", [*settings, *small]))
    assert found["pretrain"]["peak_gib"] < 60 and found["rgpo"]["peak_gib"] < 75
