"""Batched sampling against the pipeline's own request-by-request path."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from toy import ToyRecord, picture, toy_contexts, toy_folder

from mindomni_rt.inputs.prompts import DEFAULT_NEGATIVE
from mindomni_rt.loading import load
from mindomni_rt.model.save import save_model
from mindomni_rt.training.stages import rollouts
from mindomni_rt.training.stages.contexts import context_of, thought_text
from mindomni_rt.training.stages.losses import IGNORE, entropy, token_log_probs, without_token


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = toy_folder(tmp_path_factory.mktemp("toy"))
    contexts = toy_contexts(folder)
    save_model(contexts.model, folder, source=folder)
    return folder


def test_a_batch_paints_what_the_pipeline_paints(folder):
    pipe, contexts = load(folder, device="cpu"), toy_contexts(folder, noisy=False)
    prompts = ["draw one red circle", "draw two", "the same picture is a blue blue square"]
    images = [None, None, picture(5)]
    noise = np.random.default_rng(0).normal(size=(3, 4, 4, 4)).astype(np.float32)
    conversations = [
        contexts.paint(p, think=True, images=[i] if i is not None else []) for p, i in zip(prompts, images, strict=True)
    ]
    written = rollouts.write(contexts, conversations, 7)
    full = [c.extended(w.token_ids[:-1]) for c, w in zip(conversations, written, strict=True)]
    negative = contexts.paint(DEFAULT_NEGATIVE, think=False)
    latents = rollouts.paint_contexts(contexts, full, torch.from_numpy(noise), 4, 2.5, negative)
    painted = rollouts.decode(contexts, latents)
    for row, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
        result = pipe.generate(
            prompt, image=image, think=True, max_new_tokens=7, height=32, width=32, num_inference_steps=4,
            guidance_scale=2.5, latents=noise[row : row + 1],
        )  # fmt: skip
        assert result.token_ids == written[row].token_ids
        np.testing.assert_allclose(latents[row].numpy(), result.latents[0], atol=2e-5)
        assert np.abs(painted[row].astype(int) - np.asarray(result.images[0]).astype(int)).max() <= 1


def test_sampling_is_repeatable_and_follows_the_distribution(folder):
    contexts = toy_contexts(folder)
    conversations = [contexts.paint("draw one", think=True)] * 400
    draw = [rollouts.write(contexts, conversations, 1, 1.0, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert draw[0] == draw[1]
    batch = contexts.batch(conversations[:1])
    expected = contexts.model.language.logits(contexts.states(batch)[0, -1]).softmax(-1)
    counts = torch.bincount(torch.tensor([w.token_ids[0] for w in draw[0]]), minlength=len(expected)) / 400
    assert (counts - expected).abs().max() < 0.08  # about three standard errors of the likeliest token
    assert all(w.cut == (w.token_ids[0] not in (contexts.eos, 0)) for w in draw[0])


def test_padding_changes_nothing(folder):
    contexts = toy_contexts(folder)
    long = contexts.paint("draw two red square the same picture", think=False, images=[picture(2)])
    short = contexts.paint("draw one", think=True)
    together = contexts.batch([long, short])
    states = contexts.states(together)
    alone = contexts.batch([short])
    torch.testing.assert_close(states[1, : together.lengths[1]], contexts.states(alone)[0], atol=1e-5, rtol=1e-5)
    condition, spans = contexts.condition(together, states)
    single, _ = contexts.condition(alone, contexts.states(alone))
    torch.testing.assert_close(condition[1, : together.lengths[1]], single[0], atol=1e-5, rtol=1e-5)
    assert spans[0] and spans[0][0][1] - spans[0][0][0] == 4 and spans[1] == []


def test_images_batch_exactly(folder):
    contexts = toy_contexts(folder)
    patches = [contexts.paint("draw", think=False, images=[picture(i)]).patches for i in range(3)]
    together = contexts.vision(patches)
    torch.testing.assert_close(together, torch.cat([contexts.vision([p]) for p in patches]), atol=1e-5, rtol=1e-5)


def test_labels_cover_what_the_model_writes(folder):
    contexts = toy_contexts(folder)
    thought = ToyRecord("draw two", think_content="two is red", answer="two red", output_image=picture(0))
    asked = ToyRecord("how many", reply="three", input_images=(picture(1),))
    rows = [context_of(contexts, r, think=True, thought=True) for r in (thought, asked)]
    batch = contexts.batch(rows)
    texts = []
    for row in batch.labels():
        texts.append(contexts.chat.tokenizer.decode(row[row != IGNORE].tolist(), skip_special_tokens=False))
    written = thought_text("two is red", "two red").replace("><", "> <")
    assert texts == [f"{written} <|im_end|>", "three <|im_end|>"]
    # The condition of a finished thought ends with its closing tag.
    assert contexts.chat.tokenizer.id_to_token(int(rows[0].token_ids[-1])) == "</answer>"


def test_greedy_text_has_the_repetition_penalty_of_the_checkpoint(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    path = tmp_path / "model" / "mllm" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"repetition_penalty": 1.7}))
    pipe, contexts = load(tmp_path / "model", device="cpu"), toy_contexts(tmp_path / "model", noisy=False)
    assert contexts.config.generation.repetition_penalty == 1.7
    prompts = ["draw one red circle", "draw two", "the same picture is a blue blue square"]
    found = rollouts.write(contexts, [contexts.paint(p, think=True) for p in prompts], 12)
    without = rollouts.write(contexts, [contexts.paint(p, think=True) for p in prompts], 12, repetition_penalty=1.0)
    assert [w.token_ids for w in found] != [w.token_ids for w in without]  # the penalty decides something here
    for prompt, completion in zip(prompts, found, strict=True):
        result = pipe.generate(
            prompt, think=True, max_new_tokens=12, height=32, width=32, num_inference_steps=1, guidance_scale=1, seed=0
        )
        assert result.token_ids == completion.token_ids


def test_the_policy_never_chooses_an_image_token(folder, tmp_path):
    contexts = toy_contexts(folder)
    image = contexts.config.language.image_token_id
    with torch.no_grad():  # a head that wants the image token most of the time
        contexts.model.language.lm_head.weight.mul_(0.01)
        contexts.model.language.norm.weight.fill_(1.0)
        direction = contexts.states(contexts.batch([contexts.paint("draw one", think=True)]))[0, -1]
        contexts.model.language.lm_head.weight[image] = direction
    prompt = contexts.paint("draw one", think=True, images=[picture(0)])
    free = rollouts.write(contexts, [prompt] * 20, 3, 1.0, torch.Generator().manual_seed(0))
    assert any(image in w.token_ids for w in free)
    kept = rollouts.write(contexts, [prompt] * 20, 3, 1.0, torch.Generator().manual_seed(0), forbidden=image)
    assert not any(image in w.token_ids for w in kept)
    # Its probability is zero in the loss too: the others add up to one, and the entropy is finite.
    logits = without_token(torch.randn(2, 7, requires_grad=True), 3)
    probabilities = token_log_probs(logits.unsqueeze(1).expand(2, 7, 7), torch.arange(7).expand(2, 7)).exp()
    assert probabilities[:, 3].max() == 0 and torch.allclose(probabilities.sum(1), torch.ones(2))
    others = [i for i in range(7) if i != 3]
    torch.testing.assert_close(entropy(logits), entropy(logits[:, others]))


def test_an_image_token_that_was_written_is_no_image(folder):
    contexts = toy_contexts(folder)
    image = contexts.config.language.image_token_id
    prompt = contexts.paint("draw one", think=True, images=[picture(0)])
    x = contexts.embed(contexts.batch([prompt.extended([image, 5])]))
    assert torch.equal(x[0, -2], contexts.model.language.embed_tokens.weight[image])
    alone = contexts.embed(contexts.batch([prompt]))
    torch.testing.assert_close(x[:, : alone.shape[1]], alone)
