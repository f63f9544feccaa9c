"""Several prompts in one call, asyncio, and results as values."""

from __future__ import annotations

import asyncio
import base64
import io
import pickle
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import PARITY, relative
from PIL import Image

import mindomni_rt
from mindomni_rt import AsyncPipeline, BadRequestError, GenerationCancelled, ImageEvent, Pipeline, Request, StepEvent
from mindomni_rt.batch import MOST_PIXELS, groups
from mindomni_rt.checkpoint.config import RecommendedConfig
from mindomni_rt.errors import MindOmniError, MissingExtraError, not_finite
from mindomni_rt.events import TextEvent
from mindomni_rt.request import complete

SMALL: dict[str, Any] = dict(height=32, width=48, num_inference_steps=3, max_new_tokens=5, output="numpy")
PROMPTS = ["two cats", "a red house by the sea", "x"]
BUNDLE = Path(__file__).parents[1] / "assets" / "shapes-world-bundle"


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return mindomni_rt.load(PARITY, device="cpu", dtype="float32", fast=False)


@pytest.mark.parametrize(
    "options",
    [{}, dict(guidance_scale=1.0), dict(num_images=2), dict(first_step="condition_only"), dict(solver="multistep")],
    ids=str,
)
def test_a_batch_is_what_each_prompt_makes_alone(pipe: Pipeline, options: dict[str, Any]) -> None:
    together = pipe.generate_batch(PROMPTS, seed=4, **SMALL, **options)
    for index, (prompt, found) in enumerate(zip(PROMPTS, together, strict=True)):
        alone = pipe.generate(prompt, seed=4 + index * options.get("num_images", 1), **SMALL, **options)
        assert found.text == alone.text and found.seed == alone.seed and found.settings == alone.settings
        assert relative(found.images, alone.images) < 1e-5 and relative(found.latents, alone.latents) < 1e-5


def test_a_batch_is_one_loop_and_events_tell_their_prompt(pipe: Pipeline) -> None:
    events = list(pipe.stream_batch(PROMPTS, seed=4, **SMALL))
    assert sum(isinstance(e, StepEvent) for e in events) == 3
    assert [e.prompt for e in events if isinstance(e, ImageEvent)] == [0, 1, 2]
    texts = ["".join(e.text for e in events if isinstance(e, TextEvent) and e.prompt == i) for i in range(3)]
    assert texts == [e.result.text for e in events if isinstance(e, ImageEvent)]


def test_backends_that_paint_one_at_a_time() -> None:
    bundle = mindomni_rt.load(BUNDLE, device="cpu")
    found = bundle.generate_batch(
        ["a red circle", "two blue squares"], seed=7, num_inference_steps=2, max_new_tokens=48
    )
    for index, prompt in enumerate(("a red circle", "two blue squares")):
        assert found[index] == bundle.generate(prompt, seed=7 + index, num_inference_steps=2, max_new_tokens=48)


def test_groups_are_neighbours_of_equal_settings_within_a_limit() -> None:
    own = RecommendedConfig()
    sizes = [512, 512, 256, 512, 1024, 1024, 1024, 1024, 1024, 2048]
    asked = [complete(Request(prompt="x", height=s, width=s), own) for s in sizes]
    assert MOST_PIXELS == 4 * 1024**2
    assert [[i for i, _ in g] for g in groups(asked, True)] == [[0, 1], [2], [3], [4, 5, 6, 7], [8], [9]]
    assert [[i for i, _ in g] for g in groups(asked, False)] == [[i] for i in range(10)]


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "there is no prompt"),
        (["a", 3], {}, "prompt 1 = 3"),
        (["a", " "], {}, "prompt is empty"),
        (["a"], dict(latents=np.zeros((1, 4, 4, 6))), "latents beside several prompts"),
        ([Request(prompt="a")], dict(seed=1), "seed beside a Request"),
        (["a", "b"], dict(seed=2**64 - 1), "seed = "),
        ("a", {}, "prompts = 'a': expected a list of texts or Requests; `generate` takes one"),
        (Request(prompt="a"), {}, "expected a list of texts or Requests"),
        (None, {}, "expected a list of texts or Requests"),
        (np.array(["a"]), {}, "expected a list of texts or Requests"),
    ],
)
def test_mistakes_in_a_list(pipe: Pipeline, prompts: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRequestError, match=message):
        pipe.stream_batch(prompts, **options)


def test_without_a_seed_each_prompt_draws_its_own(pipe: Pipeline) -> None:
    one, two = pipe.generate_batch(["x", "x"], **SMALL)
    assert one.seed != two.seed
    assert np.array_equal(pipe.generate(**{**one.settings, "output": "numpy"}).text, one.text)


def test_settings_repeat_the_picture(pipe: Pipeline, tmp_path: Path) -> None:
    made = pipe.generate("two cats", **{**SMALL, "output": "pil", "num_images": 2, "seed": 3, "cascade": True})
    assert pipe.generate(**made.settings) == made
    for name in ("a.png", "a.jpg", "a.webp"):
        paths = made.save(tmp_path / name)
        for path, image in zip(paths, made.images, strict=True):
            again = pipe.generate(**mindomni_rt.read_settings(path))
            found, wanted = (np.asarray(i, np.int16) for i in (again.images[0], image))
            assert np.abs(found - wanted).max() <= 1  # a batch of two rounds otherwise than one
    answered = pipe.understand("what?", max_new_tokens=3, temperature=1.0)
    assert pipe.understand(**answered.settings) == answered


def test_results_compare_pickle_and_hide_from_sets(pipe: Pipeline) -> None:
    one, two = (pipe.generate("two cats", seed=1, **SMALL) for _ in range(2))
    assert one == two and one.timings != two.timings
    assert one != pipe.generate("two cats", seed=2, **SMALL) and one != "x"
    assert one != replace(one, images=[]) and replace(one, images=[]) != one
    copy = pickle.loads(pickle.dumps(one))
    assert copy == one and np.array_equal(copy.latents, one.latents)
    with pytest.raises(TypeError, match="unhashable"):
        hash(one)


def _errors(kind: type[MindOmniError]) -> Iterator[type[MindOmniError]]:
    for sub in kind.__subclasses__():
        yield sub
        yield from _errors(sub)


def test_errors_cross_processes() -> None:
    made = [kind("what") for kind in _errors(MindOmniError) if kind is not MissingExtraError]
    for error in (*made, MissingExtraError("torch", "torch"), not_finite("vae", "float16")):
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is type(error) and str(copy) == str(error)


def test_notebooks_show_thinking_and_images(pipe: Pipeline) -> None:
    result = pipe.generate("two cats", seed=1, **SMALL)
    shown = Image.open(io.BytesIO(result._repr_png_() or b""))
    assert shown.size == (48, 32)
    spoken = replace(result, rounds=(replace(result.rounds[0], thinking="a < b <script>", answer="cats & dogs"),))
    html = spoken._repr_html_()
    assert "a &lt; b &lt;script&gt;" in html and "cats &amp; dogs" in html and "seed 1" in html
    data = base64.b64decode(html.split("base64,")[1].split('"')[0])
    assert Image.open(io.BytesIO(data)).size == (48, 32)
    assert pipe.understand("what?", max_new_tokens=2)._repr_png_() is None


@pytest.mark.parametrize("bars", [True, False], ids=["tqdm", "plain"])
def test_progress_on_request(
    pipe: Pipeline, bars: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not bars:
        monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    pipe.generate("two cats", seed=1, **SMALL)
    assert capsys.readouterr() == ("", "")
    pipe.generate("two cats", seed=1, progress=True, **SMALL)
    shown = capsys.readouterr()
    assert shown.out == "" and ("3/3" if bars else "painting: 3 of 3 steps\n") in shown.err


def test_pictures_of_every_kind_make_the_same_edit(pipe: Pipeline, tmp_path: Path) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 48, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    raw = buffer.getvalue()
    (tmp_path / "a.png").write_bytes(raw)
    text = base64.b64encode(raw).decode()
    options = dict(seed=1, num_inference_steps=1, guidance_scale=1.0, max_new_tokens=2)
    wanted = pipe.edit(picture, "red", **options)  # type: ignore[arg-type]
    assert wanted.images[0].size == (48, 32)
    for source in (
        raw,
        io.BytesIO(raw),
        tmp_path / "a.png",
        text,
        f"data:image/png;base64,{text}",
        np.asarray(picture),
    ):
        assert pipe.edit(source, "red", **options) == wanted  # type: ignore[arg-type]
    assert pipe.generate("red", image=io.BytesIO(raw), **options) == wanted  # type: ignore[arg-type]


def test_a_waiting_request_can_be_cancelled(pipe: Pipeline) -> None:
    running = pipe.stream("two cats", seed=1, **SMALL)
    next(running)
    cancel, outcome = threading.Event(), list[Any]()

    def wait() -> None:
        try:
            pipe.generate("x", cancel=cancel, **SMALL)
        except GenerationCancelled as error:
            outcome.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.05)
    cancel.set()
    thread.join(timeout=30)
    assert not thread.is_alive() and len(outcome) == 1
    running.close()


def test_asyncio(pipe: Pipeline) -> None:
    alone = pipe.generate("two cats", seed=1, **SMALL)

    async def use() -> None:
        served = AsyncPipeline(pipe)
        one, two = await asyncio.gather(*(served.generate("two cats", seed=1, **SMALL) for _ in range(2)))
        assert one == two == alone
        assert (await served.generate_batch(["two cats"], seed=1, **SMALL)) == [alone]
        parts = [e async for e in served.stream_batch(["two cats"], seed=1, **SMALL)]
        assert isinstance(parts[-1], ImageEvent) and parts[-1].result == alone
        answered = await served.understand("what?", max_new_tokens=2)
        assert answered == pipe.understand("what?", max_new_tokens=2, seed=answered.seed)
        edited = await served.edit(np.zeros((32, 48, 3), np.uint8), "red", seed=1, **SMALL)
        assert edited.images.shape == (1, 32, 48, 3)  # type: ignore[union-attr]
        events = [e async for e in served.stream("two cats", seed=1, **SMALL)]
        assert isinstance(events[-1], ImageEvent) and events[-1].result == alone
        with pytest.raises(BadRequestError, match="height"):
            await served.generate("x", height=3)

    asyncio.run(use())


def test_a_cancelled_task_stops_its_request_within_a_step(pipe: Pipeline) -> None:
    options = {**SMALL, "num_inference_steps": 1000}

    async def use() -> int:
        served, seen = AsyncPipeline(pipe), 0

        async def paint() -> None:
            nonlocal seen
            async with aclosing(served.stream("two cats", seed=1, **options)) as events:
                async for event in events:
                    seen += isinstance(event, StepEvent)

        task = asyncio.create_task(paint())
        while not seen:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(served.generate("two cats", **options), timeout=0.1)
        async with aclosing(served.stream("two cats", **options)) as events:
            async for event in events:
                if isinstance(event, StepEvent):
                    break
        return seen

    assert asyncio.run(use()) < 900
    # The turn is free at once: a request of this thread would wait for ever otherwise.
    assert pipe.generate("x", seed=1, **SMALL).seed == 1
