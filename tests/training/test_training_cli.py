"""The command line from outside: whole stages in turn, and one line with exit code 2 for each mistake."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import PARITY
from toy import picture, toy_folder

from mindomni_rt.checkpoint.layout import open_checkpoint
from mindomni_rt.loading import load
from mindomni_rt.training.cli import main
from mindomni_rt.training.data.world.clip import WorldClip, save_clip
from mindomni_rt.training.data.world.vae import CONFIG as VAE_CONFIG
from mindomni_rt.training.data.world.vae import AutoencoderKL, save_vae
from mindomni_rt.training.evaluation.ablate import CONFIGS


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """An untrained autoencoder and reward model, as `mindomni train world` leaves trained ones."""
    folder = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    save_vae(AutoencoderKL(VAE_CONFIG), folder / "vae")
    save_clip(WorldClip(), folder / "reward")
    return folder


def test_all_stages_in_turn(runs, capsys):
    assert main(["new", str(runs / "fresh"), "--vae", str(runs / "vae"), "--width", "32"]) == 0
    before = runs / "fresh"
    for stage in ("prior", "pretrain", "sft", "rgpo"):
        small = ["optim.steps=2", "optim.batch=8", "optim.warmup=1", "device=cpu", "data.image_size=96"]
        if stage == "rgpo":
            small += [
                "optim.batch=2",
                "rgpo.group=2",
                "rgpo.max_new_tokens=5",
                "rgpo.image_steps=2",
                "rgpo.dump_every=1",
            ]
            small += [f"rgpo.reward_model={runs / 'reward'}"]
        if stage == "pretrain":
            small += ["evaluate_every=2", "evaluate_count=4"]
        arguments = [stage, "--quiet", "--config", str(CONFIGS / f"shapes-{stage}.toml"), *small]
        arguments += [f"model={before}", f"out={runs / stage}", f"data.cache_latents={runs / 'latents'}"]
        assert main(arguments) == 0, capsys.readouterr().err
        before = runs / stage / "model"
    assert f"model: {before}" in capsys.readouterr().out
    lines = [json.loads(line) for line in (runs / "rgpo" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    wanted = {
        "reward/format", "reward/format_std", "reward/consistency", "reward/zero_std_groups", "loss/kl_text",
        "loss/kl_image", "policy/entropy", "policy/clip_fraction", "policy/ratio", "completion/length",
        "completion/truncated", "grad_norm", "time/rollout", "time/reward", "time/update", "lr",
    }  # fmt: skip
    assert wanted <= set(lines[0])
    assert lines[0]["policy/ratio"] == 1.0 and lines[0]["loss/kl_text"] == 0.0 and lines[0]["loss/kl_image"] == 0.0
    assert (runs / "rgpo" / "rollouts" / "step-000001.png").exists()
    assert len((runs / "rgpo" / "rollouts" / "step-000001.jsonl").read_text().splitlines()) == 4
    evaluations = [json.loads(x) for x in (runs / "pretrain" / "evaluation.jsonl").read_text().splitlines()]
    assert [e["step"] for e in evaluations] == [0, 2] and "captions/image" in evaluations[0]
    header = json.loads((runs / "rgpo" / "runs.jsonl").read_text().splitlines()[0])
    assert header["config"]["stage"] == "rgpo" and header["commit"]
    record = runs / "evaluate-rgpo.json"
    assert main(["evaluate", str(before), "--suite", "captions", "--n", "2", "--steps", "2", "--out", str(record)]) == 0
    packed = runs / "assets"
    stages = [x for s in ("prior", "pretrain", "sft", "rgpo") for x in ("--run", str(runs / s))]
    assert main(["pack", str(before), str(packed), "--record", f"stage 3={record}", *stages]) == 0
    card = (packed / "README.md").read_text()
    share = json.loads(record.read_text())["scores"]["captions"]["image"]["share"]
    assert f"| captions | {100 * share:.1f} % (" in card and "n = 2 a suite" in card
    assert "`sft`: 2 steps of 8" in card and "<unk>" in card
    # The result is a checkpoint like any other.
    result = load(packed, device="cpu").generate(
        "draw (1 + 1) things of the colour of a lemon, shaped like a coin", num_inference_steps=2,
        max_new_tokens=4, seed=0,
    )  # fmt: skip
    assert result.images[0].size == (96, 96)
    recommended = open_checkpoint(packed).config.recommended
    assert (recommended.num_inference_steps, recommended.guidance_scale) == (10, 1.0)
    assert recommended.trained_sides == (96, 96)


MISTAKES = {
    "no such file": (["pretrain", "--config", "none.toml"], "none.toml: No such file"),
    "unknown key": (["sft", "--config", "{configs}/shapes-sft.toml", "optim.speed=1"], "unknown key optim.speed"),
    "another stage": (["sft", "--config", "{configs}/shapes-rgpo.toml"], "is for stage rgpo"),
    "no model": (["sft", "--config", "{configs}/shapes-sft.toml", "model=/none"], "no folder at /none"),
    "unknown reward": (
        ["rgpo", "--config", "{configs}/shapes-rgpo.toml", "model={toy}", "rgpo.rewards=['beauty','format']"],
        "reward 'beauty'",
    ),
    "no data": (
        ["sft", "--config", "{configs}/sft-full.toml", "model={toy}", "data.paths=['none.jsonl']", "out={out}"],
        "none.jsonl: No such file",
    ),
    "no GPU": (["sft", "--config", "{configs}/shapes-sft.toml", "model={toy}", "device=cuda"], "no CUDA device"),
    "bad width": (["new", "{out}", "--vae", "{vae}", "--width", "33"], "multiple of 32"),
    "no evaluation data": (
        ["sft", "--config", "{configs}/sft-full.toml", "model={toy}", "evaluate_every=5"],
        "evaluate_every needs data.validation",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_end_in_one_line(name, runs, tmp_path, capsys):
    if name == "no GPU" and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    arguments, message = MISTAKES[name]
    places = {"configs": CONFIGS, "toy": toy_folder(runs / "toy"), "out": tmp_path / "out", "vae": runs / "vae"}
    assert main([a.format(**places) if "{" in a else a for a in arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and message in error and "\n" not in error


def test_dry_run_prints_the_plan(capsys):
    assert main(["dry-run", "--config", str(CONFIGS / "pretrain-full.toml"), "--gpus", "4"]) == 0
    assert "237.5 M parameters train" in capsys.readouterr().out


def test_own_data_with_validation(runs, tmp_path, capsys):
    picture(1).save(tmp_path / "a.png")
    lines = [{"instruction": f"draw {n}", "output_image": "a.png", "gt_prompt": n} for n in ("one", "two", "three")]
    for name in ("train", "held"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    arguments = ["sft", "--quiet", "--config", str(CONFIGS / "sft-full.toml"), f"model={toy_folder(runs / 'toy')}"]
    arguments += [f"out={tmp_path / 'run'}", f"data.paths=['{tmp_path / 'train.jsonl'}']", "data.image_size=32"]
    arguments += [f"data.validation=['{tmp_path / 'held.jsonl'}']", "evaluate_every=2", "evaluate_count=4"]
    assert main([*arguments, "optim.steps=3", "optim.batch=2", "device=cpu"]) == 0, capsys.readouterr().err
    found = [json.loads(x) for x in (tmp_path / "run" / "evaluation.jsonl").read_text().splitlines()]
    assert [e["step"] for e in found] == [0, 2, 3]
    assert all(e["flow"] > 0 for e in found)
    # Resuming with more steps goes on from the third.
    assert main([*arguments, "optim.steps=4", "optim.batch=2", "device=cpu"]) == 0
    steps = [json.loads(x)["step"] for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]


@pytest.mark.parametrize("stage", ["prior", "pretrain", "sft", "rgpo"])
def test_a_stage_with_nothing_set_but_model_and_data(stage, runs, tmp_path, capsys):
    picture(1).save(tmp_path / "a.png")
    line = {"instruction": "draw one", "think_content": "one", "instruction_qwen": "one", "output_image": "a.png"}
    (tmp_path / "a.jsonl").write_text(json.dumps(line) + "\n")
    (tmp_path / "a.toml").write_text(
        f"stage = '{stage}'\nmodel = '{toy_folder(runs / 'toy')}'\nout = '{tmp_path / 'run'}'\n"
        f"[data]\nsource = 'jsonl'\npaths = ['{tmp_path / 'a.jsonl'}']\n"
    )
    small = ["data.image_size=32", "optim.steps=1", "optim.batch=2"]  # only so that it is quick
    code = main([stage, "--quiet", "--config", str(tmp_path / "a.toml"), *small])
    error = capsys.readouterr().err
    if stage == "rgpo":
        assert code == 2 and "needs rgpo.reward_model" in error and "--only reward" in error and error.count("\n") == 1
        (tmp_path / "b.toml").write_text((tmp_path / "a.toml").read_text() + "[rgpo]\nrewards = ['format']\n")
        small += ["rgpo.max_new_tokens=3", "rgpo.image_steps=2"]
        code = main([stage, "--quiet", "--config", str(tmp_path / "b.toml"), *small])
    assert code == 0, error
    before, after = (open_checkpoint(p).config.recommended for p in (runs / "toy", tmp_path / "run" / "model"))
    assert before.trained_sides == (96, 96)
    if stage in ("prior", "sft"):  # these train the decoder
        assert after == replace(before, width=32, height=32, trained_sides=(32, 96))
    else:
        assert after == before
    assert (tmp_path / "run" / "adapter").is_dir() == (stage == "sft")


def test_the_adapter_of_a_run_makes_its_model(tmp_path, capsys):
    picture(1).save(tmp_path / "a.png")
    line = {"instruction": "draw one", "think_content": "one", "instruction_qwen": "one", "output_image": "a.png"}
    (tmp_path / "a.jsonl").write_text(json.dumps(line) + "\n")
    (tmp_path / "a.toml").write_text(
        f"stage = 'sft'\nmodel = '{PARITY}'\nout = '{tmp_path}'\ndevice = 'cpu'\n"
        f"[data]\nsource = 'jsonl'\npaths = ['{tmp_path / 'a.jsonl'}']\nimage_size = 32\n"
        "[optim]\nsteps = 2\nbatch = 2\nlr = 0.05\n[lora]\nrank = 3\nalpha = 7\n"
    )
    assert main(["sft", "--quiet", "--config", str(tmp_path / "a.toml")]) == 0, capsys.readouterr().err
    pipes = [load(path, device="cpu", dtype="float32", fast=False) for path in (PARITY, tmp_path / "model")]
    untouched, trained = (dict(pipe.backend.model.named_parameters()) for pipe in pipes)
    moved = {name for name in trained if not torch.equal(untouched[name], trained[name])}
    assert {name.split(".")[0] for name in moved} == {"connector", "decoder"}
    pipes[0].load_adapter(tmp_path / "adapter")
    assert all(torch.equal(untouched[name], trained[name]) for name in trained)


def test_accuracy_of_the_world_at_another_size_is_refused(runs, tmp_path, capsys):
    small = [f"model={toy_folder(runs / 'toy')}", f"out={tmp_path}", "data.image_size=32", "device=cpu"]
    assert main(["sft", "--config", str(CONFIGS / "shapes-sft.toml"), *small]) == 2
    assert "reads images of 96 pixels" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [[], ["fly"], ["sft"], ["evaluate"], ["plot"], ["pack"], ["ablate", "--jobs", "x"]]
)
def test_mistakes_of_the_command_line_are_one_line(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    told = capsys.readouterr().err
    assert error.value.code == 2 and told.startswith("error: ") and told.count("\n") == 1


def test_an_override_of_the_stage_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mindomni_rt.training.cli import main

    config = tmp_path / "sft.toml"
    config.write_text('stage = "sft"\nmodel = "m"\nout = "o"\n')
    assert main(["sft", "--config", str(config), "stage=rgpo"]) == 2
    assert "'stage=rgpo' on the command line is for stage rgpo" in capsys.readouterr().err
