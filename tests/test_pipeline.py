"""The pipeline's behaviour: options, events, caching, cancellation and each wrong request."""

from __future__ import annotations

import gc
import json
import logging
import pickle
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PARITY
from PIL import Image

import mindomni_rt
from mindomni_rt import BadRequestError, GenerationCancelled, ImageEvent, Pipeline, StepEvent, TextEvent
from mindomni_rt.demo import DEMO_MODELS
from mindomni_rt.inputs.positions import image_positions
from mindomni_rt.model.tiny import write_random_checkpoint
from mindomni_rt.request import Request

SMALL: dict[str, Any] = dict(height=32, width=48, num_inference_steps=2, max_new_tokens=6, seed=1, output="numpy")


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return mindomni_rt.load(PARITY, device="cpu")


@pytest.fixture(scope="module")
def editor(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """A random checkpoint whose tokenizer knows the places of VAE features."""
    folder = tmp_path_factory.mktemp("model")
    write_random_checkpoint(folder)
    return mindomni_rt.load(folder, device="cpu")


def picture(width: int = 70, height: int = 40) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def test_a_seed_repeats_and_images_of_a_batch_stand_alone(pipe: Pipeline) -> None:
    three = pipe.generate("two cats", num_images=3, **SMALL)
    again = pipe.generate("two cats", num_images=3, **SMALL)
    assert three.images.shape == (3, 32, 48, 3) and np.array_equal(three.images, again.images)
    alone = pipe.generate("two cats", **{**SMALL, "seed": 3})
    np.testing.assert_allclose(alone.images[0], three.images[2], atol=1e-5)
    assert np.abs(three.images[0] - three.images[1]).max() > 0.01


def test_latents_override_the_seed(pipe: Pipeline) -> None:
    latents = np.random.default_rng(0).standard_normal((1, 4, 4, 6)).astype(np.float32)
    first = pipe.generate("two cats", **{**SMALL, "latents": latents})
    second = pipe.generate("two cats", **{**SMALL, "latents": latents, "seed": 99})
    assert np.array_equal(first.images, second.images) and first.seed is None


def test_no_seed_draws_one_and_tells_it(pipe: Pipeline) -> None:
    drawn = pipe.generate("two cats", **{**SMALL, "seed": None})
    again = pipe.generate("two cats", **{**SMALL, "seed": drawn.seed})
    assert np.array_equal(drawn.images, again.images)
    assert drawn.settings["seed"] == drawn.seed


@pytest.mark.parametrize(("height", "width"), [(16, 16), (16, 80), (48, 32), (112, 16)])
def test_any_multiple_of_16(pipe: Pipeline, height: int, width: int) -> None:
    result = pipe.generate("x", **{**SMALL, "height": height, "width": width})
    assert result.images.shape == (1, height, width, 3)
    assert np.isfinite(result.images).all() and result.images.min() >= 0 and result.images.max() <= 1


def test_65_steps_of_guidance_1_run_one_branch(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guidance 1 is the guided branch alone: the same image as with both branches at a scale of nearly 1."""
    options = {**SMALL, "num_inference_steps": 65, "think": False}
    near = pipe.generate("two cats", guidance_scale=1.0 + 1e-7, **options)
    monkeypatch.setattr(pipe, "connect_negative", None)  # must not be needed
    one = pipe.generate("two cats", guidance_scale=1.0, **options)
    np.testing.assert_allclose(one.images, near.images, atol=1e-4)


def test_the_negative_prefix_is_kept_across_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = mindomni_rt.load(PARITY, device="cpu")
    options = {**SMALL, "think": False, "negative_prompt": "bad"}
    calls = []
    original = pipe.backend.prefix
    monkeypatch.setattr(pipe.backend, "prefix", lambda *a, **k: calls.append(1) or original(*a, **k))
    first = pipe.generate("two cats", **options)
    assert len(calls) == 2  # both branches
    second = pipe.generate("two cats", **options)
    assert len(calls) == 3  # the guided one only
    assert np.array_equal(first.images, second.images)
    pipe.generate("two cats", **{**options, "num_inference_steps": 3})
    assert len(calls) == 5  # other times, other K/V
    large = pipe.generate("two cats", **{**options, "height": 160, "width": 208})
    assert len(calls) == 7  # beyond the original context LongRoPE turns differently
    fresh = mindomni_rt.load(PARITY, device="cpu").generate("two cats", **{**options, "height": 160, "width": 208})
    assert np.array_equal(large.images, fresh.images)


def test_first_step_changes_the_image(pipe: Pipeline) -> None:
    full, quirk = (pipe.generate("x", first_step=f, **SMALL).images for f in ("full", "condition_only"))
    assert np.abs(full - quirk).max() > 1e-3


def test_events_tell_the_whole_story(pipe: Pipeline) -> None:
    events = list(pipe.stream("two cats", preview_every=1, **{**SMALL, "num_inference_steps": 4, "output": "pil"}))
    texts = [e for e in events if isinstance(e, TextEvent)]
    steps = [e for e in events if isinstance(e, StepEvent)]
    assert isinstance(events[-1], ImageEvent)
    result = events[-1].result
    assert "".join(t.text for t in texts) == result.text  # this random model writes no tags
    assert [s.step for s in steps] == [1, 2, 3, 4] and all(s.total == 4 for s in steps)
    assert [s.preview is not None for s in steps] == [True, True, True, False]
    assert steps[0].preview[0].size == (48, 32)
    assert result.images[0].size == (48, 32)
    for stage in ("language", "connector", "prefix", "denoiser", "vae", "first_token", "total"):
        assert result.timings[stage] > 0
    assert sum(v for k, v in result.timings.items() if k not in ("total", "first_token")) <= result.timings["total"]


def test_the_last_preview_is_near_the_image(pipe: Pipeline) -> None:
    """Following the velocity to the end from the last but one step is where the last step goes, nearly."""
    events = list(pipe.stream("x", preview_every=1, **{**SMALL, "num_inference_steps": 40, "output": "pil"}))
    previews = [np.asarray(e.preview[0], float) for e in events if isinstance(e, StepEvent) and e.preview]
    final = np.asarray(events[-1].result.images[0], float)
    first, last = (np.abs(p - final).mean() for p in (previews[0], previews[-1]))
    assert last < 3 and last < first


def test_previews_do_not_change_the_image(pipe: Pipeline) -> None:
    plain = pipe.generate("x", **SMALL)
    previewed = pipe.generate("x", preview_every=1, **SMALL)
    assert np.array_equal(plain.images, previewed.images)


@pytest.mark.parametrize("when", [TextEvent, StepEvent])
def test_cancelling(pipe: Pipeline, when: type) -> None:
    cancel = threading.Event()
    seen = []
    with pytest.raises(GenerationCancelled):
        for event in pipe.stream("two cats", cancel=cancel, **{**SMALL, "num_inference_steps": 5}):
            seen.append(event)
            if isinstance(event, when):
                cancel.set()
    assert sum(isinstance(e, when) for e in seen) <= 2 and not any(isinstance(e, ImageEvent) for e in seen)
    assert pipe.generate("two cats", **SMALL).images.shape  # and the pipeline still works


def test_a_callback_can_cancel_and_a_generator_be_closed(pipe: Pipeline) -> None:
    with pytest.raises(GenerationCancelled):
        pipe.generate("two cats", callback=lambda event: False, **SMALL)
    stream = pipe.stream("two cats", **SMALL)
    next(stream)
    stream.close()
    assert pipe.generate("two cats", **SMALL).images.shape


def test_sampling_with_a_temperature_repeats_with_its_seed(pipe: Pipeline) -> None:
    options = {**SMALL, "temperature": 1.0, "max_new_tokens": 12}
    first, second = (pipe.generate("two cats", **options) for _ in range(2))
    assert first.token_ids == second.token_ids
    others = {tuple(pipe.generate("two cats", **{**options, "seed": s}).token_ids) for s in range(2, 6)}
    assert len(others) > 1


def test_edit_features(editor: Pipeline) -> None:
    """VAE features change the image, take one token for each 16x16 pixels, and see each other in both directions."""
    plain = editor.generate("the same, but red", image=picture(), edit_features="vit", **SMALL)
    full = editor.generate("the same, but red", image=picture(), edit_features="vit+vae", **SMALL)
    assert np.abs(plain.images - full.images).max() > 1e-3
    request = Request(prompt="x", image=picture(), think=False, edit_features="vit+vae", height=32, width=48)
    thinking = editor.think(request)
    try:
        while True:
            next(thinking)
    except StopIteration as stop:
        thought = stop.value
    ((start, latents),) = thought.image_latents
    assert latents.shape == (1, 4, 4, 8)  # 70x40 → 64x32 pixels
    condition = editor.backend.connector(thought.hidden, thought.image_latents)
    expected = editor.backend.model.decoder.input_x_embedder(latents)
    expected = expected + torch.from_numpy(image_positions(editor.config.decoder, 2, 4))
    torch.testing.assert_close(condition[:, start : start + 8], expected)


def test_vae_features_need_a_checkpoint_that_knows_them(pipe: Pipeline) -> None:
    with pytest.raises(BadRequestError, match="edit_features='vit'"):
        pipe.generate("x", image=picture(), edit_features="vit+vae", **SMALL)


def test_understanding(pipe: Pipeline) -> None:
    result = pipe.understand("what is it?", picture(), max_new_tokens=5)
    assert len(result.token_ids) <= 5 and result.text == result.answer and len(result.images) == 0
    with pytest.raises(GenerationCancelled):
        pipe.understand("what is it?", max_new_tokens=5, callback=lambda e: False)


def test_a_large_photo_is_capped_and_says_so(pipe: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        pipe.understand("what is it?", Image.new("RGB", (400, 300)), max_new_tokens=1, max_image_tokens=20)
    assert "reduced" in caplog.text


def test_a_picture_beyond_the_room_of_a_small_model_is_reduced(caplog: pytest.LogCaptureFixture) -> None:
    """512x512 pixels have more tokens than the small model's prompts may."""
    pytest.importorskip("onnxruntime", reason="the small bundle needs the onnx extra")
    photo = Image.new("RGB", (512, 512), (200, 30, 30))
    with mindomni_rt.load(DEMO_MODELS[0][0], device="cpu") as small, caplog.at_level(logging.WARNING):
        for features in ("vit", "vit+vae"):
            options = {**SMALL, "num_inference_steps": 1, "edit_features": features}
            assert small.edit(photo, "make it blue", **options).images.shape == (1, 32, 48, 3)
        assert small.understand("what is it?", photo, max_new_tokens=1).token_ids
    assert "reference image reduced" in caplog.text and "for the VAE" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(prompt=""), "prompt is empty"),
        (dict(prompt=" \n"), "prompt is empty"),
        (dict(height=100, width=100), "multiple of 16"),
        (dict(height=0), "multiple of 16"),
        (dict(width=3088), "3072"),
        (dict(width=32.0), "multiple of 16"),
        (dict(num_inference_steps=0), "from 1 to 1000"),
        (dict(num_inference_steps=1001), "from 1 to 1000"),
        (dict(num_images=0), "from 1 to 256"),
        (dict(max_new_tokens=-1), "from 1 to "),
        (dict(guidance_scale=float("nan")), "finite"),
        (dict(guidance_scale=-1.0), "from 0 to 1000"),
        (dict(temperature=float("inf")), "finite"),
        (dict(first_step="fast"), "condition_only"),
        (dict(edit_features="all"), "vit"),
        (dict(output="jpeg"), "numpy"),
        (dict(cascade=True, think=False), "think=True"),
        (dict(seed="three"), "whole number"),
        (dict(latents=np.zeros((1, 4, 8, 8), np.float32)), "latents of shape"),
        (dict(image="missing.png"), "missing.png"),
        (dict(image=b"junk"), "cannot be read"),
        (dict(image=picture(900, 4)), "aspect ratio"),
        (dict(prompt="word " * 2000), "context"),
        (dict(heigth=32), "heigth"),
        (dict(preview_every=-1), "preview_every"),
    ],
)
def test_wrong_requests_are_named(pipe: Pipeline, options: dict[str, Any], message: str) -> None:
    request = {**SMALL, "prompt": "two cats", **options}
    with pytest.raises(BadRequestError, match=message):
        pipe.generate(request.pop("prompt"), **request)


def test_text_is_cut_to_the_room_that_is_left(pipe: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        result = pipe.understand("word " * 180, max_new_tokens=5000)
    assert "max_new_tokens cut" in caplog.text and len(result.token_ids) < 1024


def test_half_precision_stays_near(pipe: Pipeline) -> None:
    exact = pipe.generate("two cats", think=False, **SMALL).latents
    for dtype in ("bfloat16", "float16"):
        half = mindomni_rt.load(PARITY, device="cpu", dtype=dtype).generate("two cats", think=False, **SMALL).latents
        assert np.linalg.norm(half - exact) / np.linalg.norm(exact) < 2e-2


def test_loading_errors() -> None:
    for options, error in (
        (dict(backend="fast"), BadRequestError),
        (dict(dtype="int3"), BadRequestError),
        (dict(device="tpu"), mindomni_rt.UnsupportedDeviceError),
    ):
        with pytest.raises(error, match=r"expected|runs on"):
            mindomni_rt.load(PARITY, **{"device": "cpu", **options})


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens where there is no CUDA device")
def test_cuda_where_there_is_none() -> None:
    with pytest.raises(mindomni_rt.UnsupportedDeviceError, match="CUDA"):
        mindomni_rt.load(PARITY, device="cuda")


def test_settings_are_plain_data(pipe: Pipeline) -> None:
    settings = json.loads(json.dumps(pipe.generate("two cats", **SMALL).settings))
    repeated = pipe.generate(**{k: v for k, v in settings.items() if k not in ("backend", "dtype")}, output="numpy")
    assert np.array_equal(repeated.images, pipe.generate("two cats", **SMALL).images)


def test_decoding_alone(pipe: Pipeline, tmp_path: Path) -> None:
    result = pipe.generate("two cats", **SMALL)
    pixels = pipe.decode(torch.from_numpy(result.latents))
    np.testing.assert_allclose(pixels, result.images, atol=1e-6)


def test_cancel_is_one_event_everywhere(pipe: Pipeline) -> None:
    """generate and understand take it too; a callback's False sets it."""
    cancel = threading.Event()
    with pytest.raises(GenerationCancelled):
        pipe.generate("two cats", cancel=cancel, callback=lambda event: not isinstance(event, StepEvent), **SMALL)
    assert cancel.is_set()
    for run in (pipe.generate, pipe.understand):
        with pytest.raises(GenerationCancelled):
            run("two cats", cancel=cancel)
    with pytest.raises(GenerationCancelled):
        pipe.generate("two cats", callback=lambda event: not isinstance(event, ImageEvent), **SMALL)


def test_a_reference_image_is_decoded_once(editor: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, opened = tmp_path / "picture.png", []
    picture().save(path)
    original = Image.open

    def counted(*given: Any, **named: Any) -> Image.Image:
        opened.append(given)
        return original(*given, **named)

    monkeypatch.setattr(Image, "open", counted)
    editor.generate("the same, but red", image=path, edit_features="vit+vae", **SMALL)
    assert len(opened) == 1


def test_a_result_holds_its_latents(pipe: Pipeline) -> None:
    result = pipe.generate("two cats", **SMALL)
    assert result.latents is not None and result.latents.shape == (1, 4, 4, 6) and result.latents.dtype == np.float32
    assert np.array_equal(result.latents, pipe.generate("two cats", **SMALL).latents)
    assert np.array_equal(pickle.loads(pickle.dumps(result)).latents, result.latents)
    assert pipe.understand("what is it?", max_new_tokens=2).latents is None


@pytest.mark.parametrize(("model", "fast"), [(str(PARITY), None), (str(PARITY), True), ("demo", None)])
def test_a_dropped_pipeline_goes_with_its_weights(model: str, fast: bool | None) -> None:
    """At once, without the collector of cycles, whatever results are kept: the next one may need the memory."""
    own = mindomni_rt.load(model, device="cpu", fast=fast)
    result = own.generate("two cats", **SMALL)
    gc.collect()
    backend = weakref.ref(own.backend)
    gc.disable()
    try:
        del own
        assert backend() is None and result.latents is not None
    finally:
        gc.enable()
