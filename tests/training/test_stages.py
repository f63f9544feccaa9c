"""Each stage: what trains, what stays bit-identical, what is exactly zero at the first step."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from toy import ToyStream, toy_config, toy_contexts, toy_folder

from mindomni_rt.training.data.record import Record
from mindomni_rt.training.errors import BadConfigError, BadDataError, NonFiniteError
from mindomni_rt.training.loop.trainer import Trainer
from mindomni_rt.training.stages.adapters import merge_adapters
from mindomni_rt.training.stages.base import Draws, digest
from mindomni_rt.training.stages.pretrain import Pretrain
from mindomni_rt.training.stages.prior import Prior
from mindomni_rt.training.stages.rgpo import Rgpo
from mindomni_rt.training.stages.sft import Sft


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toy_folder(tmp_path_factory.mktemp("toy"))


def wordy(rollouts):
    """A reward with some spread: the share of distinct tokens."""
    return np.array([len(set(r.token_ids)) / 6 for r in rollouts])


CASES = {
    "prior": (Prior, (0, 1, 2, 3), r"(decoder|language|vision)\..*", {}),
    "prior-paint": (Prior, (0, 1, 2), r"decoder\..*", {"prior": {"rounds": "paint"}}),
    "prior-text": (Prior, (1, 3), r"(language|vision)\..*", {"prior": {"rounds": "text"}}),
    "pretrain": (Pretrain, (0, 1, 2), r"connector\..*", {"distill": {"weight": 16.0}, "data": {"drop": 0.3}}),
    "sft-lora": (
        Sft,
        (0, 1, 2),
        r"connector\..*|decoder\.llm\.layers\.\d+\.self_attn\.(qkv_proj|o_proj)\.weight",
        {"lora": {"rank": 2}, "distill": {"weight": 16.0}},
    ),
    "sft-full": (
        Sft,
        (0, 1, 2, 3),
        r"connector\..*|decoder\.(?!llm\.embed_tokens).*|language\..*",
        {"sft": {"decoder": "full", "text": 1.0}, "distill": {"weight": 16.0}},
    ),
    "rgpo-lora": (
        Rgpo,
        (0, 1),
        r"language\.layers\.\d+\.(self_attn|mlp)\.\w+_proj\.weight",
        {"lora": {"rank": 2}, "rgpo": {"replay": 1}},
    ),
    "rgpo-full": (Rgpo, (0, 1), r"language\..*", {"rgpo": {"image_term": "velocity", "beta_image": 1.0}}),
}


def make(name, folder, tmp_path, **extra):
    kind, kinds, pattern, tables = CASES[name]
    merged = {k: {**tables.get(k, {}), **extra.get(k, {})} for k in {*tables, *extra}}
    if kind is Rgpo:
        merged["rgpo"] = {"rewards": ["wordy"], "weights": [1.0], **merged.get("rgpo", {})}
        merged["optim"] = {"batch": 2, "steps": 3, "lr": 1e-2, **merged.get("optim", {})}
    config = toy_config(kind.name, folder, tmp_path / "run", **merged)
    contexts = toy_contexts(folder)
    arguments = ({"wordy": wordy},) if kind is Rgpo else ()
    return kind(contexts.model, contexts, config, *arguments), ToyStream(kinds), pattern


@pytest.mark.parametrize("name", CASES)
def test_what_trains_changes_and_what_is_frozen_does_not(name, folder, tmp_path):
    before = digest(toy_contexts(folder).model)
    stage, stream, pattern = make(name, folder, tmp_path)
    trainer = Trainer(stage.config, stage, stream, bar=False)
    trained = set(trainer.trained)
    trainer.run()
    merge_adapters(stage.model)
    after = digest(stage.model)
    assert after.keys() == before.keys()  # adapters merged: the published names again
    changed = {n for n in after if after[n] != before[n]}
    assert changed
    odd = sorted(n for n in changed if not re.fullmatch(pattern, n))
    assert not odd, f"frozen, yet changed: {odd[:3]}"
    bases = {re.sub(r"\.lora_[AB]\.default\.weight$", ".weight", n) for n in trained}
    assert all(re.fullmatch(pattern, n) for n in bases)
    # Everything that trains gets a gradient, but for what this data never reaches.
    idle = bases - changed
    allowed = (
        r"decoder\.input_x_embedder.*" if name == "sft-full" else r"^$|language\.layers\.\d+\.self_attn\.k_proj\.bias"
    )
    assert not [n for n in idle if not re.fullmatch(allowed, n)]


@pytest.mark.parametrize("name", ["rgpo-lora", "rgpo-full"])
def test_first_rgpo_step_has_ratio_one_and_no_kl(name, folder, tmp_path):
    stage, stream, _ = make(name, folder, tmp_path)
    stage.choose_trainable()
    terms = stage("terms", stage("prepare", stream.next_batch(2), Draws(0, 0, 0, 2, 0, 2)))
    assert terms.figures["policy/ratio"] == 1.0
    assert terms.figures["policy/clip_fraction"] == 0.0
    assert terms.parts["kl_text"].item() == 0.0
    assert terms.parts["kl_image"].item() == 0.0
    assert terms.figures["policy/entropy"] > 0
    for name in ("reward/wordy", "reward/wordy_std", "reward/zero_std_groups", "completion/truncated", "time/rollout"):
        assert name in terms.figures


def test_rgpo_follows_the_reward(folder, tmp_path):
    stage, stream, _ = make(
        "rgpo-lora", folder, tmp_path, optim={"steps": 30, "lr": 2e-2, "batch": 2}, rgpo={"group": 8, "beta_image": 0.0}
    )
    rewards = []
    Trainer(stage.config, stage, stream, bar=False, on_step=lambda _, e: rewards.append(np.mean(e.totals))).run()
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.05


def test_several_updates_of_one_set_of_rollouts_leave_ratio_one(folder, tmp_path):
    stage, stream, _ = make("rgpo-full", folder, tmp_path, rgpo={"updates": 3}, optim={"steps": 1, "lr": 1e-2})
    Trainer(stage.config, stage, stream, bar=False).run()
    log = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert '"policy/ratio": 1.0' not in log


def test_distillation_is_zero_where_student_and_teacher_see_the_same(folder, tmp_path):
    from mindomni_rt.training.stages import losses

    stage, stream, _ = make("pretrain", folder, tmp_path)
    painting = stage.prepare(stream.next_batch(3), Draws(0, 0, 0, 3, 0, 3))[0]
    once, twice = stage.teacher_features(painting), stage.teacher_features(painting)
    assert losses.feature_kl(once, twice).item() == 0.0
    assert len(once) == stage.contexts.config.decoder.stack.num_layers + 1


def test_adapters_start_as_nothing_and_merge_exactly(folder, tmp_path):
    stage, stream, _ = make("sft-lora", folder, tmp_path)
    plain = toy_contexts(folder)
    context = plain.paint("draw one", think=False)

    def velocity(contexts):
        batch = contexts.batch([context])
        condition, spans = contexts.condition(batch, contexts.states(batch))
        with torch.no_grad():
            return contexts.model.decoder(condition, torch.ones(1, 4, 4, 4), torch.tensor([0.5]), batch.lengths, spans)

    assert torch.equal(velocity(stage.contexts), velocity(plain))
    Trainer(stage.config, stage, stream, bar=False).run()
    adapted = velocity(stage.contexts)
    assert not torch.allclose(adapted, velocity(plain))
    merge_adapters(stage.model)
    torch.testing.assert_close(velocity(stage.contexts), adapted, atol=1e-5, rtol=1e-5)


def test_a_loss_that_is_no_number_names_term_and_record(folder, tmp_path):
    stage, stream, _ = make("pretrain", folder, tmp_path, optim={"steps": 2, "batch": 3})
    poison = ToyStream((0, 1, 2)).next_batch(3)[1]
    encode = stage.contexts.latents.targets

    def broken(images):
        latents = encode(images)
        for row, image in enumerate(images):
            if np.array_equal(np.asarray(image), np.asarray(poison.output_image)):
                latents[row] = float("nan")
        return latents

    stage.contexts.latents.targets = broken
    with pytest.raises(NonFiniteError, match=rf"step 1: loss term flow.* record {poison.source} is the cause"):
        Trainer(stage.config, stage, stream, bar=False).run()


def test_equal_rollouts_computed_once_give_what_each_alone_gives(folder, tmp_path, monkeypatch):
    found = []
    for name in ("once", "each"):
        settings = {"group": 8, "temperature": 0.03, "replay": 1, "guidance": 2.0}
        stage, stream, _ = make("rgpo-lora", folder, tmp_path, rgpo=settings)
        trained = stage.choose_trainable()
        if name == "each":
            monkeypatch.setattr(
                "mindomni_rt.training.stages.rgpo._distinct",
                lambda contexts, _: (list(contexts), [*range(len(contexts))]),
            )
        prepared = stage("prepare", stream.next_batch(2), Draws(0, 0, 0, 2, 0, 2))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():  # away from the reference: no term is zero
            for parameter in trained.values():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        terms = stage("terms", prepared)
        terms.total.backward()
        found.append((prepared, terms, {n: p.grad for n, p in trained.items()}))
    (once, few, grads), (each, many, wanted) = found
    assert len(once.batch.contexts) < len(each.batch.contexts) == 16
    assert once.totals == each.totals and once.rows != each.rows
    assert all(np.array_equal(a.image, b.image) for a, b in zip(once.scored, each.scored, strict=True))
    assert few.parts["kl_text"] > 0 and few.parts["kl_image"] > 0
    for name, value in many.parts.items():
        torch.testing.assert_close(few.parts[name], value, rtol=1e-4, atol=1e-7)
    for name, gradient in wanted.items():
        torch.testing.assert_close(grads[name], gradient, rtol=1e-3, atol=1e-6)


def test_an_image_kl_of_no_weight_is_measured_and_moves_nothing(folder, tmp_path):
    stage, stream, _ = make("rgpo-lora", folder, tmp_path, rgpo={"beta_image": 0.0, "beta_text": 0.0})
    stage.choose_trainable()
    terms = stage("terms", stage("prepare", stream.next_batch(2), Draws(0, 0, 0, 2, 0, 2)))
    assert not terms.parts["kl_image"].requires_grad
    assert terms.total.item() == terms.parts["policy"].item()


def test_a_fractional_alpha_scales_the_adapter(folder, tmp_path):
    stage, _, _ = make("sft-lora", folder, tmp_path, lora={"rank": 4, "alpha": 2.5})
    layer = stage.model.decoder.llm.layers[0].self_attn.qkv_proj
    assert layer.scaling["default"] == 2.5 / 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_merge_in_float32_and_round_once(dtype, folder, tmp_path):
    stage, _, _ = make("sft-lora", folder, tmp_path, lora={"rank": 4, "alpha": 3.0})
    layer = stage.model.decoder.llm.layers[0].self_attn.qkv_proj
    layer.base_layer.weight.data = layer.base_layer.weight.data.to(dtype)
    torch.manual_seed(0)
    torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.01)
    a, b = (m["default"].weight.detach().double() for m in (layer.lora_A, layer.lora_B))
    wanted = (layer.base_layer.weight.double() + 0.75 * b @ a).to(dtype)
    merge_adapters(stage.model)
    merged = stage.model.decoder.llm.layers[0].self_attn.qkv_proj.weight
    assert merged.dtype == dtype
    difference = (merged.double() - wanted.double()).abs().max()
    assert difference < (1e-6 if dtype == torch.float32 else 1e-3)
    if dtype == torch.bfloat16:  # but for ties of float32's own rounding, the nearest bf16 number everywhere
        assert (merged == wanted).float().mean() > 0.999


def test_the_rank_of_stage_2_has_a_default_and_zero_is_refused(folder, tmp_path):
    contexts = toy_contexts(folder)
    stage = Sft(contexts.model, contexts, toy_config("sft", folder, tmp_path))
    assert stage.model.decoder.llm.layers[0].self_attn.qkv_proj.lora_A["default"].weight.shape[0] == 16
    with pytest.raises(BadConfigError, match=r"sft\.decoder = 'full'"):
        toy_config("sft", folder, tmp_path, lora={"rank": 0})


@pytest.mark.parametrize("kind", [Pretrain, Sft])
def test_a_record_that_trains_nothing_is_named(kind, folder, tmp_path):
    contexts = toy_contexts(folder)
    stage = kind(contexts.model, contexts, toy_config(kind.name, folder, tmp_path))
    records = [Record(instruction="a red circle", source="mine.jsonl:7")]
    with pytest.raises(BadDataError, match=r"mine\.jsonl:7: nothing in it trains .*output_image"):
        stage.prepare(records, Draws(0, 0, 0, 1, 0, 1))
