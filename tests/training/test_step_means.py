"""Means over tokens and images are those of the whole step, whatever its micro-batches and processes."""

from __future__ import annotations

import json

import pytest
import torch
from test_loop import command, finish, folder, lines, together  # noqa: F401 folder is a fixture
from toy import ToyRecord, ToyStream, picture, toy_config, toy_contexts

from mindomni_rt.training.loop.trainer import Trainer
from mindomni_rt.training.stages.base import Draws
from mindomni_rt.training.stages.losses import IGNORE
from mindomni_rt.training.stages.prior import Prior
from mindomni_rt.training.stages.sft import Sft

LONG = "a red is two red is one the same picture is three blue circle"
UNEVEN = [
    ToyRecord("draw two", think_content=LONG, answer="two red", output_image=picture(0), gt_prompt="two red"),
    ToyRecord("draw one", think_content="one", answer="one", output_image=picture(1), gt_prompt="one"),
    ToyRecord("how many", reply="three blue circle", input_images=(picture(2),)),
    ToyRecord("draw blue", output_image=picture(3), gt_prompt="blue"),
    ToyRecord("draw three", think_content="three", answer="three", output_image=picture(4), gt_prompt="three"),
    ToyRecord("how many", reply="one", input_images=(picture(5),)),
]


class Fixed(ToyStream):
    """The records above, in order."""

    def next_batch(self, count):
        out = [UNEVEN[(self.at + i) % len(UNEVEN)] for i in range(count)]
        self.at += count
        return out


STAGES = {
    "prior": (Prior, {"prior": {"rounds": "both"}}),
    "sft": (Sft, {"sft": {"decoder": "full", "text": 0.7}, "distill": {"weight": 3.0}}),
}


def gradient(name, folder, out, accumulate):  # noqa: F811
    kind, tables = STAGES[name]
    batch = len(UNEVEN) // accumulate
    config = toy_config(name, folder, out, optim={"batch": batch, "accumulate": accumulate, "steps": 1}, **tables)
    contexts = toy_contexts(folder)
    stage = kind(contexts.model, contexts, config)
    # Noise and times depend on the micro-batch: the same for all images makes the flow loss comparable.
    stage_draws = Draws(0, 0, 0, 1, 0, 1)
    shared_noise = stage_draws.noise((4, 4, 4))
    trainer = Trainer(config, stage, Fixed(), bar=False)
    total = 0.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Draws, "noise", lambda self, shape, name="": shared_noise.expand(self.here, *shape))
        patch.setattr(Draws, "times", lambda self, name="": torch.full((self.here,), 0.4))
        for part in range(accumulate):
            records = trainer.stream.next_batch(batch)
            terms = stage("terms", stage("prepare", records, Draws(0, 0, part, batch, 0, batch)))
            (terms.total / accumulate).backward()
            total += terms.total.item() / accumulate
    return total, {n: p.grad for n, p in trainer.trained.items() if p.grad is not None}


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("accumulate", [2, 3])
def test_micro_batches_give_the_loss_and_gradient_of_one_batch(name, accumulate, folder, tmp_path):  # noqa: F811
    one, whole = gradient(name, folder, tmp_path / "one", 1)
    many, parts = gradient(name, folder, tmp_path / "many", accumulate)
    assert many == pytest.approx(one, rel=1e-5)
    assert whole.keys() == parts.keys()
    for parameter, wanted in whole.items():
        torch.testing.assert_close(parts[parameter], wanted, rtol=1e-4, atol=1e-6)


def test_the_text_loss_of_a_step_is_torchs_mean_over_all_its_tokens(folder, tmp_path):  # noqa: F811
    config = toy_config("prior", folder, tmp_path, prior={"rounds": "text"}, optim={"batch": 2, "accumulate": 3})
    contexts = toy_contexts(folder)
    stage = Prior(contexts.model, contexts, config)
    trainer = Trainer(config, stage, Fixed(), bar=False)
    found = 0.0
    every_logit, every_label = [], []
    for part in range(3):
        records = trainer.stream.next_batch(2)
        prepared = stage("prepare", records, Draws(0, 0, part, 2, 0, 2))
        with torch.no_grad():
            found += stage("terms", prepared).parts["text"].item() / 3
            logits = contexts.model.language.logits(contexts.states(prepared.writing))
        labels = prepared.writing.labels()
        every_logit.append(logits[labels != IGNORE])
        every_label.append(labels[labels != IGNORE])
    wanted = torch.nn.functional.cross_entropy(torch.cat(every_logit), torch.cat(every_label))
    assert found == pytest.approx(wanted.item(), rel=1e-5)


@pytest.mark.parametrize("drop", [0.0, 0.6])
def test_the_counts_of_a_step_are_those_of_its_labels(drop, folder, tmp_path):  # noqa: F811
    tables = {"sft": {"decoder": "full", "text": 1.0}, "data": {"drop": drop}}
    config = toy_config("sft", folder, tmp_path, **tables)
    contexts = toy_contexts(folder)
    stage = Sft(contexts.model, contexts, config)
    draws = Draws(3, 1, 0, 6, 0, 6)
    counts, prepared = stage.count(UNEVEN, draws), stage.prepare(UNEVEN, draws)
    labelled = [int((b.batch.labels() != IGNORE).sum()) for b in prepared.image_batches]
    assert counts.tokens == sum(labelled)
    assert counts.replies == int((prepared.reading.labels() != IGNORE).sum())
    assert counts.images == sum(len(b.captions) for b in prepared.image_batches) == 4
    assert sum(b.share for b in prepared.image_batches) == pytest.approx(1)
    assert sum(prepared.token_shares) == pytest.approx(1 if counts.tokens else 0)


def test_two_processes_give_the_text_loss_of_one(folder, tmp_path):  # noqa: F811
    finish("prior", folder, tmp_path / "one", 3)
    together(*command("prior", folder, tmp_path / "two", 3))
    for a, b in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)
    assert json.loads((tmp_path / "two" / "config.json").read_text())["prior"]["rounds"] == "text"
