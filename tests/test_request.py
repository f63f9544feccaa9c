"""Requests: every field is checked by name before any work."""

from __future__ import annotations

import copy as copying
import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PARITY
from hypothesis import given
from hypothesis import strategies as st

import mindomni_rt
from mindomni_rt import UNSET, BadRequestError, Pipeline
from mindomni_rt.checkpoint.config import RecommendedConfig
from mindomni_rt.errors import NotFiniteError
from mindomni_rt.inputs.prompts import DEFAULT_NEGATIVE
from mindomni_rt.request import (
    EditOptions,
    GenerateOptions,
    Request,
    UnderstandOptions,
    UnderstandRequest,
    check_callback,
    check_cancel,
    clean_text,
    complete,
    edit_size,
)

BUNDLE = Path(__file__).parents[1] / "assets" / "shapes-world-bundle"
SMALL: dict[str, Any] = dict(height=32, width=48, num_inference_steps=1, guidance_scale=1.0, seed=1, max_new_tokens=4)


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return mindomni_rt.load(PARITY, device="cpu", dtype="float32")


FIELDS = [f.name for f in dataclasses.fields(Request) if f.name not in ("prompt", "image")]
WRONG = [[], ["a"], {}, object(), b"x", "words", 10**5000, -(10**5000), 1e39, float("nan"), 3.5, np.zeros(3), True, 1j]
NUMBERS = ("height", "width", "num_inference_steps", "num_images", "max_new_tokens", "preview_every", "draft_tokens",
           "guidance_scale", "temperature", "step_cache", "seed", "max_image_tokens")  # fmt: skip


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("value", WRONG, ids=lambda v: type(v).__name__)
def test_no_field_takes_just_anything(name: str, value: Any) -> None:
    try:
        request = Request(prompt="x", **{name: value})
    except BadRequestError as error:
        message = str(error)
    else:
        kept = getattr(request, name)
        assert kept == value and (type(kept), type(value)) != (bool, int)
        assert name not in NUMBERS or not isinstance(value, bool)
        return
    assert name in message and len(message) < 300, message


@pytest.mark.parametrize("name", [*NUMBERS, "guidance_interval", "latents", "negative_prompt", "solver", "output"])
def test_booleans_are_not_numbers(name: str) -> None:
    for value in (True, np.bool_(True)):
        with pytest.raises(BadRequestError, match=name):
            Request(prompt="x", **{name: value})


@pytest.mark.parametrize("name", ["think", "cascade"])
@pytest.mark.parametrize("value", [1, "yes", None, []])
def test_only_booleans_are_flags(name: str, value: Any) -> None:
    with pytest.raises(BadRequestError, match=f"{name} = .*True or False"):
        Request(prompt="x", **{name: value})


def test_numbers_of_numpy_are_numbers() -> None:
    given = Request(
        prompt="x", height=np.int64(96), seed=np.uint8(3), guidance_scale=np.float32(2.5), think=np.bool_(False)
    )
    assert (given.height, given.seed, given.guidance_scale, given.think) == (96, 3, 2.5, False)
    assert {type(v) for v in (given.height, given.seed)} == {int} and type(given.guidance_scale) is float
    json.dumps(given.settings())


def test_none_is_the_default_where_it_means_something() -> None:
    assert Request(prompt="x", negative_prompt=None).negative_prompt == DEFAULT_NEGATIVE  # type: ignore[arg-type]
    for name in ("height", "width", "num_inference_steps", "seed"):
        assert getattr(Request(prompt="x"), name) is None
    for name in ("guidance_interval", "num_images", "solver", "first_step", "step_cache"):
        with pytest.raises(BadRequestError, match=name):
            Request(prompt="x", **{name: None})


def test_no_guidance_and_the_models_own_are_told_apart(pipe: Pipeline) -> None:
    """None means "no guidance" to some and "the default" to others: it is refused, by name."""
    with pytest.raises(BadRequestError, match=r"^guidance_scale = None: .* leave it out .* or give 1 for no guidance$"):
        Request(prompt="x", guidance_scale=None)  # type: ignore[arg-type]
    left_out = Request(prompt="x")
    assert left_out.guidance_scale is UNSET and "guidance_scale=UNSET" in repr(left_out)
    assert Request(prompt="x", guidance_scale=UNSET) == left_out and "guidance_scale" not in left_out.settings()
    for copy in (pickle.loads(pickle.dumps(left_out)), copying.deepcopy(left_out)):
        assert copy == left_out and copy.guidance_scale is UNSET
    with pytest.raises(BadRequestError, match="height = UNSET"):
        Request(prompt="x", height=UNSET)  # type: ignore[arg-type]
    whole = complete(left_out, TRAINED)
    with pytest.raises(BadRequestError, match="guidance_scale = UNSET"):
        dataclasses.replace(whole, guidance_scale=UNSET)
    json.dumps(whole.settings())
    assert whole.settings()["guidance_scale"] == 1.5


@pytest.mark.parametrize("prompts", [["a", "b"], ("a",), []])
def test_one_call_paints_one_prompt(pipe: Pipeline, prompts: Any) -> None:
    for call in (pipe.generate, pipe.stream):
        with pytest.raises(BadRequestError, match=r"^prompt = .*: expected one text; `generate_batch` takes several$"):
            call(prompts)
    with pytest.raises(BadRequestError, match="expected one text"):
        pipe.edit(np.zeros((32, 48, 3), np.uint8), prompts)
    with pytest.raises(BadRequestError, match=r"prompt = .*: expected text"):
        pipe.understand(prompts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(guidance_scale=1e38), "guidance_scale"),
        (dict(num_images=10**9), "num_images"),
        (dict(num_images=200, height=1024, width=1024), "pixels in all"),
        (dict(temperature=1e-9), "temperature"),
        (dict(guidance_interval=(0.5, 0.5)), "start below end"),
        (dict(guidance_interval=(0, float("nan"))), "guidance_interval"),
        (dict(prompt=["a", "b"]), "prompt = .*expected text"),
        (dict(negative_prompt=["a"]), "negative_prompt = .*expected text"),
        (dict(negative_prompt="<|image_pad|>"), "negative_prompt holds the image placeholder"),
        (dict(prompt="a <|image_pad|>"), "prompt holds the image placeholder"),
        (dict(prompt="x" * 600_000), "prompt has 600000 characters"),
    ],
)
def test_values_out_of_reason(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRequestError, match=message):
        Request(**{"prompt": "x", **options})


NOISE = np.random.default_rng(0).standard_normal((1, 4, 4, 6)).astype(np.float32)


@pytest.mark.parametrize(
    ("latents", "tolerance"),
    [
        (NOISE, 0),
        (NOISE.astype(np.float64), 1e-7),
        (NOISE[..., ::-1][..., ::-1], 0),
        (torch.from_numpy(NOISE), 0),
        (torch.from_numpy(NOISE).requires_grad_(), 0),
        (torch.from_numpy(NOISE).bfloat16(), 2e-2),
        (torch.from_numpy(NOISE).half().requires_grad_(), 2e-3),
        (NOISE.tolist(), 0),
    ],
)
def test_latents_of_every_kind(latents: Any, tolerance: float) -> None:
    kept = Request(prompt="x", height=32, width=48, latents=latents).latents
    assert kept is not None and kept.dtype == np.float32 and kept.flags.c_contiguous
    assert np.abs(kept - NOISE).max() <= tolerance


@pytest.mark.parametrize(
    "latents",
    [NOISE * np.nan, NOISE * np.inf, NOISE.astype(str), NOISE.astype(complex), NOISE[0], np.zeros(3), "noise", 3, [[1]],
     torch.zeros(1, 4, 4, 5), torch.zeros(1, 4, 4, 6, dtype=torch.complex64), NOISE.astype(object)],
    ids=lambda v: type(v).__name__,
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_latents_that_are_none(latents: Any) -> None:
    with pytest.raises(BadRequestError, match="latents"):
        Request(prompt="x", height=32, width=48, latents=latents)


def test_surrogates_are_replaced() -> None:
    assert clean_text("a\ud83d\ude00b") == "a\U0001f600b" and clean_text("caf\udce9") == "caf\ufffd"
    assert Request(prompt="a \udcff cat", negative_prompt="\ud800").prompt == "a \ufffd cat"
    assert UnderstandRequest(prompt="\ud83d?").prompt == "\ufffd?"


@given(st.text(alphabet=st.characters(), max_size=20))
def test_clean_text_can_be_written_and_clean_text_stays(text: str) -> None:
    clean_text(text).encode("utf-8")
    assert clean_text(clean_text(text)) == clean_text(text)
    assert clean_text("".join(c for c in text if not "\ud800" <= c <= "\udfff")) == "".join(
        c for c in text if not "\ud800" <= c <= "\udfff"
    )


@pytest.mark.parametrize("value", [True, 3, "f", object()])
def test_callbacks_and_cancels(pipe: Pipeline, value: Any) -> None:
    for check, name in ((check_callback, "callback"), (check_cancel, "cancel")):
        with pytest.raises(BadRequestError, match=f"{name} = "):
            check(value)
        assert check(None) is None
    with pytest.raises(BadRequestError, match="callback"):
        pipe.generate("x", callback=value, **SMALL)
    with pytest.raises(BadRequestError, match="cancel"):
        pipe.stream("x", cancel=value, **SMALL)
    with pytest.raises(BadRequestError, match="cancel"):
        pipe.understand("x", cancel=value)


@pytest.mark.parametrize(
    ("options", "name"),
    [(dict(max_new_tokens=0), "max_new_tokens"), (dict(seed="x"), "seed"), (dict(temperature=True), "temperature"),
     (dict(max_image_tokens=3), "max_image_tokens"), (dict(prompt=""), "prompt is empty"), (dict(prompt=7), "prompt")],
)  # fmt: skip
def test_understanding_is_checked_at_the_call(pipe: Pipeline, options: dict[str, Any], name: str) -> None:
    request = {"prompt": "what?", **options}
    with pytest.raises(BadRequestError, match=name):
        pipe.understand(request.pop("prompt"), **request)


def test_a_cut_text_says_so(pipe: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    result = pipe.generate("two cats", **SMALL)
    assert len(result.token_ids) == 4 and result.finish_reason == "length"
    assert "cut at max_new_tokens = 4" in caplog.text
    assert pipe.understand("what?", max_new_tokens=2).finish_reason == "length"
    assert pipe.generate("two cats", **{**SMALL, "think": False}).finish_reason == "stop"


def test_each_round_of_a_cascade_is_parsed_by_itself(pipe: Pipeline) -> None:
    result = pipe.generate("two cats", cascade=True, **SMALL)
    first, second = result.rounds
    assert result.text == f"{first.text}\n\ncascade_thinking:{second.text}"
    assert (result.answer, result.thinking) == (second.answer, second.thinking)
    assert result.token_ids == [*first.token_ids, *second.token_ids]
    assert first.answer == first.text.strip()  # no tags in what random weights write


@pytest.mark.parametrize(
    ("stage", "module"),
    [("vision", "vision"), ("language", "language.layers"), ("connector", "connector"),
     ("denoiser", "decoder.llm.layers"), ("vae", "vae.decoder")],
)  # fmt: skip
def test_a_nan_names_its_stage(pipe: Pipeline, stage: str, module: str) -> None:
    weights = list(pipe.backend.model.get_submodule(module).parameters())  # type: ignore[attr-defined]
    before = [w.data.clone() for w in weights]
    for weight in weights:
        weight.data.fill_(float("nan"))
    picture = np.zeros((56, 56, 3), np.uint8)
    try:
        with pytest.raises(NotFiniteError, match=f"stage {stage} .* in float32"):
            pipe.generate("x", image=picture, **SMALL)
    finally:
        for weight, kept in zip(weights, before, strict=True):
            weight.data.copy_(kept)
    assert pipe.generate("x", **SMALL).images


def test_options_are_the_fields_of_the_requests() -> None:
    """What an editor completes is what the dataclass has, in its order."""
    for options, request in ((EditOptions, Request), (UnderstandOptions, UnderstandRequest)):
        names = [f.name for f in dataclasses.fields(request)]
        assert list(options.__annotations__) == [n for n in names if n not in ("prompt", "image")]
    assert GenerateOptions.__annotations__.keys() == EditOptions.__annotations__.keys() | {"image"}


def test_a_request_object_is_taken_as_it_is(pipe: Pipeline) -> None:
    options = {**SMALL, "seed": 3, "output": "numpy"}
    one, two = pipe.generate("two cats", **options), pipe.generate(Request(prompt="two cats", **options))
    assert np.array_equal(one.images, two.images)
    with pytest.raises(BadRequestError, match="seed beside a Request"):
        pipe.generate(Request(prompt="x"), seed=1)
    with pytest.raises(BadRequestError, match="did you mean height"):
        pipe.generate("x", hieght=64)  # type: ignore[call-arg]
    asked = UnderstandRequest(prompt="what?", max_new_tokens=3)
    assert pipe.understand(asked).text == pipe.understand("what?", max_new_tokens=3).text


@pytest.mark.parametrize(
    ("size", "wanted"),
    [((96, 96), (96, 96)), ((640, 480), (640, 480)), ((100, 50), (96, 48)), ((4032, 3024), (1184, 880)),
     ((5, 7), (16, 16)), ((100_000, 20), (3072, 16))],
)  # fmt: skip
def test_size_of_an_edit(size: tuple[int, int], wanted: tuple[int, int]) -> None:
    assert edit_size(*size, RecommendedConfig()) == wanted


@pytest.mark.parametrize(
    ("size", "wanted"), [((640, 480), (112, 80)), ((96, 96), (96, 96)), ((20, 500), (64, 128)), ((16, 16), (64, 64))]
)
def test_an_edit_stays_within_what_the_model_was_trained_for(size: tuple[int, int], wanted: tuple[int, int]) -> None:
    """640x480 at 96² pixels is 110.9x83.1, in sixteens 112x80; 20x500 is 19x480, whose sides are clamped."""
    trained = RecommendedConfig(width=96, height=96, trained_sides=(64, 128))
    assert edit_size(*size, trained) == wanted


TRAINED = RecommendedConfig(width=64, height=48, num_inference_steps=3, guidance_scale=1.5, trained_sides=(48, 64))


@pytest.mark.parametrize(
    ("options", "size", "steps", "guidance"),
    [
        ({}, (64, 48), 3, 1.5),
        (dict(height=64), (64, 64), 3, 1.5),
        (dict(num_inference_steps=7, guidance_scale=1.0), (64, 48), 7, 1.0),
        (dict(latents=np.zeros((1, 4, 8, 6))), (48, 64), 3, 1.5),
        (dict(image=np.zeros((480, 480, 3), np.uint8)), (48, 48), 3, 1.5),
    ],
)
def test_what_is_unset_is_the_models(
    options: dict[str, Any], size: tuple[int, int], steps: int, guidance: float, caplog: pytest.LogCaptureFixture
) -> None:
    found = complete(Request(prompt="x", **options), TRAINED)
    assert (found.width, found.height) == size
    assert (found.num_inference_steps, found.guidance_scale) == (steps, guidance)
    assert not caplog.records
    assert complete(found, RecommendedConfig()) is found


def test_the_published_model_keeps_its_own() -> None:
    found = complete(Request(prompt="x"), RecommendedConfig())
    assert (found.width, found.height, found.num_inference_steps, found.guidance_scale) == (1024, 1024, 50, 3.0)


def test_another_size_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    pipe = mindomni_rt.load(BUNDLE, device="cpu")
    pipe.generate("a red circle", width=64, height=80, num_inference_steps=1, max_new_tokens=48, seed=1)
    (record,) = caplog.records
    assert record.getMessage() == ("size 64x80: this model was trained for sides of 96 pixels; recommended is 96x96")
    made = pipe.generate("a red circle", max_new_tokens=48, seed=1)
    assert len(caplog.records) == 1 and made.images[0].size == (96, 96)
    assert (made.settings["num_inference_steps"], made.settings["guidance_scale"]) == (10, 1.0)


@pytest.mark.parametrize("latents", [np.zeros((1, 4, 4, 4)), np.zeros((2, 4, 4, 6))])
def test_latents_of_another_size(latents: Any) -> None:
    with pytest.raises(BadRequestError, match=r"latents of shape .*expected \(1, 4, 4, 6\)"):
        Request(prompt="x", height=32, width=48, latents=latents)


def test_edit_takes_the_size_of_the_picture(pipe: Pipeline) -> None:
    options = {k: v for k, v in SMALL.items() if k not in ("height", "width")}
    picture = np.zeros((48, 64, 3), np.uint8)
    assert pipe.edit(picture, "make it red", **options).images[0].size == (64, 48)
    assert pipe.edit(picture, "make it red", height=32, **options).images[0].size == (64, 32)


def test_a_long_negative_prompt_is_refused_before_work(pipe: Pipeline) -> None:
    stream = pipe.stream("x", negative_prompt="word " * 5000, **{**SMALL, "guidance_scale": 3.0})
    with pytest.raises(BadRequestError, match="context"):
        next(stream)  # no text event came first
