"""The loop from outside: killed and resumed, stopped politely, on two processes, on a full disk."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from toy import ToyStream, toy_config, toy_contexts, toy_folder

from mindomni_rt.errors import BadCheckpointError
from mindomni_rt.model.mindomni import load_model
from mindomni_rt.model.save import save_model
from mindomni_rt.training.config import OptimConfig
from mindomni_rt.training.errors import BadConfigError, StorageError
from mindomni_rt.training.loop import checkpointing
from mindomni_rt.training.loop.logs import Log
from mindomni_rt.training.loop.rollout_dump import dump_rollouts
from mindomni_rt.training.loop.trainer import Trainer, learning_rate
from mindomni_rt.training.stages.base import Sample
from mindomni_rt.training.stages.pretrain import Pretrain

HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{HERE.parents[1]}:{HERE}", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toy_folder(tmp_path_factory.mktemp("toy"))


def command(stage, folder, out, steps, pause=0.0):
    return [sys.executable, str(HERE / "run_toy.py"), stage, str(folder), str(out), str(steps), str(pause)]


def finish(*arguments):
    done = subprocess.run(command(*arguments), env=ENVIRONMENT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stage", ["sft", "rgpo"])
def test_killed_and_resumed_is_bit_for_bit_the_same(stage, folder, tmp_path):
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    finish(stage, folder, whole, 7)
    process = subprocess.Popen(command(stage, folder, torn, 7, 0.4), env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    log = torn / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (log.exists() and log.read_text().count("\n") >= 3):
        time.sleep(0.02)
    time.sleep(random.uniform(0, 0.8))  # anywhere in the steps that follow, or while one is saved
    process.kill()
    process.wait()
    assert not (torn / "final.pt").exists(), "the run ended before it was killed"
    finish(stage, folder, torn, 7)
    a, b = (torch.load(out / "final.pt") for out in (whole, torn))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[n], b[n]) for n in a)
    first, second = lines(whole), lines(torn)
    assert [r["step"] for r in second] == list(range(1, 8))  # no step twice
    assert [r["loss"] for r in first] == [r["loss"] for r in second]


def test_sigterm_saves_and_says_how_to_go_on(folder, tmp_path):
    out = tmp_path / "run"
    process = subprocess.Popen(
        command("pretrain", folder, out, 50, 0.2), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )
    while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").read_text():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert "the same command resumes" in error
    state = checkpointing.latest(out / "checkpoints")
    assert state is not None and state.step == lines(out)[-1]["step"] < 50


def together(*arguments):
    """A command in two processes that find each other, as torchrun starts them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(2):
        network = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
        environment = {**ENVIRONMENT, **network, "LOCAL_RANK": str(rank)}
        processes.append(subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE, text=True))
    errors = [p.communicate(timeout=240)[1] for p in processes]
    assert [p.returncode for p in processes] == [0, 0], errors[0][-2000:]


def test_two_processes_give_the_losses_of_one(folder, tmp_path):
    finish("pretrain", folder, tmp_path / "one", 20)
    together(*command("pretrain", folder, tmp_path / "two", 20))
    one, two = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert len(one) == len(two) == 20
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)
    # A checkpoint of two processes is a checkpoint of one.
    resumed = checkpointing.latest(tmp_path / "two" / "checkpoints")
    alone = checkpointing.latest(tmp_path / "one" / "checkpoints")
    assert resumed.weights.keys() == alone.weights.keys()
    for name, weight in alone.weights.items():
        torch.testing.assert_close(resumed.weights[name], weight, atol=2e-3, rtol=1e-2)


@pytest.mark.slow
def test_rgpo_on_two_processes_with_frozen_bf16_weights(folder, tmp_path):
    together(*command("rgpo", folder, tmp_path, 2))
    first, second = lines(tmp_path)
    # Exactly zero in one process (test_stages); sharded bf16 weights leave rounding, 1.0e-5 measured.
    assert first["policy/ratio"] == 1.0 and abs(first["loss/kl_text"]) < 1e-4 and first["loss/kl_image"] < 1e-4
    assert second["loss"] == second["loss"] and second["grad_norm"] > 0
    state = checkpointing.latest(tmp_path / "checkpoints")
    assert all(".lora_" in name and weight.dtype == torch.float32 for name, weight in state.weights.items())


@pytest.mark.slow
def test_two_processes_write_a_whole_model(folder, tmp_path):
    config = HERE.parents[1] / "training" / "configs" / "shapes-sft.toml"
    save_model(toy_contexts(folder).model, tmp_path / "start", source=folder)
    folder = tmp_path / "start"
    settings = ["sft.decoder=lora", "lora.rank=2", "distill.weight=0.0", "optim.steps=2", "optim.batch=4"]
    places = [f"model={folder}", f"out={tmp_path}", f"data.cache_latents={tmp_path / 'latents'}", "data.image_size=32"]
    together(
        sys.executable, "-m", "training", "sft", "--quiet", "--config", str(config), *settings, *places, "device=cpu",
        "data.drop_prompts=['<cfg>']",
    )  # fmt: skip
    model, _ = load_model(tmp_path / "model")
    start, _ = load_model(folder)
    state = checkpointing.latest(tmp_path / "checkpoints")
    linear = model.connector[0].weight
    assert torch.equal(linear, state.weights["connector.0.weight"])
    assert not torch.equal(linear, start.connector[0].weight)
    # The adapters' product, merged: B A at alpha = rank.
    name = "decoder.llm.layers.0.self_attn.qkv_proj"
    product = state.weights[f"{name}.lora_B.default.weight"] @ state.weights[f"{name}.lora_A.default.weight"]
    merged = model.get_submodule(name).weight - start.get_submodule(name).weight
    torch.testing.assert_close(merged, product, atol=1e-6, rtol=1e-4)
    assert torch.equal(model.language.embed_tokens.weight, start.language.embed_tokens.weight)


def test_recomputed_activations_change_nothing(folder, tmp_path):
    for name, again in (("kept", False), ("again", True)):
        trainer(folder, tmp_path / name, recompute=again, distill={"weight": 16.0}).run()
    kept, again = lines(tmp_path / "kept"), lines(tmp_path / "again")
    assert [r["loss"] for r in kept] == [r["loss"] for r in again]


def trainer(folder, out, **tables):
    config = toy_config("pretrain", folder, out, **tables)
    contexts = toy_contexts(folder)
    return Trainer(config, Pretrain(contexts.model, contexts, config), ToyStream((0, 1, 2)), bar=False)


def test_keeps_the_newest_and_only_whole_ones(folder, tmp_path):
    run = trainer(folder, tmp_path, optim={"steps": 6}, save_every=1, keep=2)
    run.run()
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000005", "step-00000006"]
    killed = tmp_path / "checkpoints" / "step-00000009"
    killed.mkdir()
    (killed / ".state.pt.0123456789abcdef.partial").write_bytes(b"half of a state")
    state = checkpointing.latest(tmp_path / "checkpoints")
    assert state.step == 6
    checkpointing.save(tmp_path / "checkpoints", dataclasses.replace(state, step=9), keep=3)
    assert [p.name for p in killed.iterdir()] == ["state.pt"]
    shutil.rmtree(killed)
    (tmp_path / "checkpoints" / "step-00000006" / "state.pt").write_bytes(b"torn")
    with pytest.raises(BadCheckpointError, match="delete its folder"):
        checkpointing.latest(tmp_path / "checkpoints")


@pytest.mark.parametrize("name", ["metrics.jsonl", "evaluation.jsonl"])
def test_a_log_on_a_full_disk_is_named(name, folder, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / name).symlink_to("/dev/full")
    config = toy_config("pretrain", folder, out, evaluate_every=1)
    contexts = toy_contexts(folder)
    stage = Pretrain(contexts.model, contexts, config)
    with pytest.raises(StorageError, match=rf"{name} cannot be written: No space left"):
        Trainer(config, stage, ToyStream((0, 1)), evaluate=lambda _: {"x": 1.0}, bar=False).run()


def test_rollouts_on_a_full_disk_are_named(tmp_path, monkeypatch):
    (tmp_path / "step-000001.jsonl").write_text("of an earlier run")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"rollouts .* cannot be written: No space left"):
        dump_rollouts(tmp_path, 1, [Sample(0, "p", "x", "", 1.0, np.zeros((4, 4, 3), np.uint8))])
    assert (tmp_path / "step-000001.jsonl").read_text() == "of an earlier run" and len(list(tmp_path.iterdir())) == 1


def test_a_log_is_cut_whole_or_not_at_all(folder, tmp_path, monkeypatch):
    """Resuming on a full disk must not cost the lines that are there."""
    out = tmp_path / "run"
    out.mkdir()
    before = '{"step": 1}\n{"step": 9}\n'
    for name in ("metrics.jsonl", "runs.jsonl"):
        (out / name).write_text(before)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        Log(toy_config("pretrain", folder, out), 1, bar=False)
    assert (out / "metrics.jsonl").read_text() == before
    monkeypatch.undo()
    with Log(toy_config("pretrain", folder, out), 1, bar=False):
        assert (out / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_a_folder_of_something_else_keeps_its_configuration(folder, tmp_path):
    (tmp_path / "config.json").write_text("mine")
    with pytest.raises(BadConfigError, match=r"config\.json, which is not of a run"):
        Log(toy_config("pretrain", folder, tmp_path), 0, bar=False)
    assert (tmp_path / "config.json").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


class Evil:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_a_run_that_someone_else_made_executes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    step = tmp_path / "checkpoints" / "step-00000001"
    step.mkdir(parents=True)
    torch.save(
        {"step": 1, "weights": {}, "optimizer": {}, "ema": {}, "data": Evil(), "fingerprint": {}}, step / "state.pt"
    )
    with pytest.raises(BadCheckpointError, match=r"state\.pt does not read"):
        checkpointing.latest(tmp_path / "checkpoints")
    assert not Path("pwned").exists()


def test_a_full_disk_is_named_and_keeps_what_was_saved(folder, tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    run = trainer(folder, tmp_path, optim={"steps": 1})
    run.run()
    state = checkpointing.latest(tmp_path / "checkpoints")
    original = Path.open
    try:
        Path.open = lambda self, *a, **k: original(Path("/dev/full") if "state.pt" in self.name else self, *a, **k)
        with pytest.raises(StorageError, match="the disk is full"):
            checkpointing.save(tmp_path / "checkpoints", dataclasses.replace(state, step=2), keep=1)
    finally:
        Path.open = original
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_a_checkpoint_of_another_stage_is_refused(folder, tmp_path):
    run = trainer(folder, tmp_path, optim={"steps": 1})
    run.run()
    state = checkpointing.latest(tmp_path / "checkpoints")
    torn = dataclasses.replace(state, weights={"other": torch.zeros(1)})
    with pytest.raises(BadCheckpointError, match="other parameters"):
        checkpointing.restore(torn, run.trained, run.optimizer, run.ema)


def test_a_run_of_another_seed_is_not_resumed(folder, tmp_path):
    trainer(folder, tmp_path, optim={"steps": 1}).run()
    with pytest.raises(BadCheckpointError, match="of another run"):
        trainer(folder, tmp_path, optim={"steps": 2}, seed=7).run()


def test_average_follows_its_formula(folder, tmp_path):
    run = trainer(folder, tmp_path, optim={"steps": 1, "ema": 0.75, "lr": 0.1})
    name = next(iter(run.trained))
    before = run.trained[name].detach().clone()
    run.run()
    after = run.trained[name].detach().clone()
    expected = 0.75 * before + 0.25 * after
    torch.testing.assert_close(run.ema[name], expected)
    run.use_average()
    torch.testing.assert_close(run.trained[name].detach(), expected)


def test_learning_rate_by_hand():
    config = OptimConfig(steps=12, lr=1.0, warmup=2, schedule="cosine", final=0.1)
    assert [learning_rate(config, s) for s in (0, 1, 2)] == [0.5, 1.0, 1.0]
    assert learning_rate(config, 7) == pytest.approx(0.55)  # halfway: (1 + 0.1) / 2
    assert learning_rate(config, 12) == pytest.approx(0.1)
    linear = OptimConfig(steps=10, lr=2.0, schedule="linear")
    assert learning_rate(linear, 5) == pytest.approx(1.0)
    assert learning_rate(OptimConfig(lr=3.0), 999) == 3.0


def test_bf16_trains(folder, tmp_path):
    run = trainer(folder, tmp_path, optim={"steps": 2}, precision="bf16", distill={"weight": 16.0})
    run.run()
    assert all(p.dtype == torch.float32 for p in run.trained.values())
    assert [r["step"] for r in lines(tmp_path)] == [1, 2]
