"""The eight parity cases: inputs and outputs of the released code on a tiny checkpoint, on every backend."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CASES, PARITY, load_case, relative

import mindomni_rt
from mindomni_rt.backends.base import DenoiseRequest
from mindomni_rt.inputs.images import prepare_image
from mindomni_rt.pipeline import Pipeline
from mindomni_rt.request import Request
from mindomni_rt.sampling.denoise import denoise
from mindomni_rt.sampling.random import noise
from mindomni_rt.sampling.schedule import timesteps

PAINTING = [c for c in CASES if not c.startswith("understand")]
UNDERSTANDING = [c for c in CASES if c.startswith("understand")]


# Relative error allowed, and the largest in a pixel.
BOUNDS = {"torch": (1e-4, 1 / 255), "torch fast": (1e-4, 1 / 255), "onnx": (1e-4, 1 / 255), "onnx fp16": (2e-2, 2e-2)}


@pytest.fixture(scope="module", params=BOUNDS)
def pipe(request: pytest.FixtureRequest, parity: Path, bundles: Callable[[str], Path]) -> Pipeline:
    folder = {"onnx": "fp32", "onnx fp16": "fp16"}.get(request.param)
    fast = True if request.param == "torch fast" else None
    pipe = mindomni_rt.load(bundles(folder) if folder else parity, device="cpu", fast=fast)
    pipe.bound, pipe.pixel_bound = BOUNDS[request.param]  # type: ignore[attr-defined]
    return pipe


def as_request(case: dict[str, Any], **more: Any) -> Request:
    return Request(
        prompt=case["text"],
        image=PARITY / "cases" / case["image"] if case["image"] else None,
        think=case["think"],
        cascade=case["cascade_thinking"],
        height=case["height"],
        width=case["width"],
        num_inference_steps=case["num_inference_steps"],
        guidance_scale=case["guidance_scale"],
        negative_prompt=case["negative_prompt"],
        seed=case["seed"],
        max_new_tokens=case["max_new_tokens"],
        first_step="condition_only" if case["upstream_kv_cache"] else "full",
        **more,
    )


def run_to_end(generator: Any) -> Any:
    """A generator's return value."""
    while True:
        try:
            next(generator)
        except StopIteration as stop:
            return stop.value


def test_all_eight_cases_are_here() -> None:
    assert len(PAINTING) == 6 and len(UNDERSTANDING) == 2


@pytest.mark.parametrize("name", PAINTING)
def test_each_stage(pipe: Pipeline, name: str) -> None:
    case, arrays = load_case(name)
    request = as_request(case)
    thought = run_to_end(pipe.think(request))
    rounds = [k for k in arrays if k.startswith("generated_sequence")]
    generated = [
        arrays[k][0, arrays[k.replace("generated_sequence", "generate_input") + ".input_ids"].shape[1] :]
        for k in sorted(rounds)
    ]
    assert thought.token_ids == [int(t) for part in generated for t in part]
    assert thought.text == case["output_text"]
    hidden = pipe.backend.numpy(thought.hidden)
    assert hidden.shape[1] == case["prefix_tokens"][0]
    assert relative(hidden, arrays["context_hidden_state"]) < pipe.bound
    assert relative(pipe.backend.numpy(pipe.backend.connector(thought.hidden)), arrays["connector_cond"]) < pipe.bound

    latents = arrays["initial_latents"]
    np.testing.assert_allclose(noise(case["seed"], latents.shape), latents, atol=2e-6)
    times = timesteps(case["num_inference_steps"])
    loop = DenoiseRequest(
        latents=latents,
        times=times,
        guided=pipe.connect(thought, request),
        unguided=pipe.connect_negative(request),
        guidance_scale=case["guidance_scale"],
        first_step=request.first_step,
    )
    velocities = [pipe.backend.numpy(state.velocity)[0] for state in denoise(pipe.backend, loop)]
    assert len(velocities) == len(arrays["guided_velocity"])
    for found, expected in zip(velocities, arrays["guided_velocity"], strict=True):
        assert relative(found, expected) < pipe.bound


@pytest.mark.parametrize("name", PAINTING)
def test_from_prompt_to_pixels(pipe: Pipeline, name: str) -> None:
    case, arrays = load_case(name)
    request = as_request(case, output="numpy")
    options = {k: getattr(request, k) for k in request.__dataclass_fields__ if k != "prompt"}
    result = pipe.generate(request.prompt, **options)
    assert result.text == case["output_text"] and result.seed == case["seed"]
    expected = arrays["image"].transpose(0, 2, 3, 1)
    assert isinstance(result.images, np.ndarray) and result.images.shape == expected.shape
    assert np.abs(result.images - expected).max() < pipe.pixel_bound


@pytest.mark.parametrize("name", UNDERSTANDING)
def test_understanding(pipe: Pipeline, name: str) -> None:
    case, arrays = load_case(name)
    image = PARITY / "cases" / case["image"] if case["image"] else None
    result = pipe.understand(case["text"], image, max_new_tokens=case["max_new_tokens"])
    prompt = arrays["generate_input_0.input_ids"][0]
    assert result.token_ids == arrays["generated_sequence_0"][0, len(prompt) :].tolist()
    assert result.text == case["answer"]


@pytest.mark.parametrize("name", UNDERSTANDING)
def test_understanding_hidden_states_and_logits(pipe: Pipeline, name: str) -> None:
    import torch

    from mindomni_rt.backends.torch.backend import TorchBackend
    from mindomni_rt.inputs.prompts import understand_messages

    case, arrays = load_case(name)
    patches = prepare_image(PARITY / "cases" / case["image"], pipe.config) if case["image"] else None
    embeds = pipe.backend.vision(patches) if patches else None
    if patches:
        np.testing.assert_allclose(patches.patches, arrays["generate_input_0.pixel_values"], atol=1e-5)
        assert list(patches.grid) == arrays["generate_input_0.image_grid_thw"][0].tolist()
    messages = understand_messages(case["text"], patches is not None)
    language = pipe.language_request(messages, patches, embeds)
    assert language.token_ids.tolist() == arrays["generate_input_0.input_ids"][0].tolist()
    session = pipe.backend.language(language)
    hidden = session.hidden()
    assert relative(pipe.backend.numpy(hidden), arrays["prompt_hidden_prenorm"]) < pipe.bound
    if isinstance(pipe.backend, TorchBackend):
        with torch.inference_mode():
            logits = pipe.backend.model.language.logits(hidden).numpy()
    else:  # a compiled graph computes the last row alone
        logits = pipe.backend.numpy(session._scores)
    assert relative(logits, arrays["prompt_logits"][:, -logits.shape[1] :]) < pipe.bound


def test_negative_prompt_agrees(pipe: Pipeline) -> None:
    from mindomni_rt.inputs.prompts import generate_messages

    case, arrays = load_case("t2i_plain")
    messages = generate_messages(case["negative_prompt"], think=False)
    language = pipe.language_request(messages)
    hidden = pipe.backend.language(language).hidden()
    assert relative(pipe.backend.numpy(hidden), arrays["negative_context_hidden_state"]) < pipe.bound
    assert relative(pipe.backend.numpy(pipe.backend.connector(hidden)), arrays["connector_uncond"]) < pipe.bound
