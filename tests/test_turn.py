"""One pipeline, many threads: requests wait for each other, and a stopped one leaves nothing behind."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import PARITY

import mindomni_rt
from mindomni_rt import BadRequestError, GenerationCancelled, GenerationResult, Pipeline

SMALL: dict[str, Any] = dict(height=32, width=48, num_inference_steps=2, seed=1, max_new_tokens=4, output="numpy")
BUNDLE = Path(__file__).parents[1] / "assets" / "shapes-world-bundle"


@pytest.fixture(scope="module", params=["torch", "fast", "onnx"])
def pipe(request: pytest.FixtureRequest) -> Pipeline:
    if request.param == "onnx":
        return mindomni_rt.load(BUNDLE, device="cpu")
    return mindomni_rt.load(PARITY, device="cpu", dtype="float32", fast=request.param == "fast")


def same(one: GenerationResult, two: GenerationResult) -> bool:
    return one.text == two.text and np.array_equal(one.images, two.images)


def test_threads_wait_for_each_other(pipe: Pipeline) -> None:
    prompts = ["two cats", "a red house by the sea", "x"]
    alone = [pipe.generate(p, **SMALL) for p in prompts]
    found: dict[tuple[int, int], GenerationResult] = {}

    def work(index: int) -> None:
        for lap in range(3):
            found[index, lap] = pipe.generate(prompts[index], **SMALL)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 9
    assert all(same(result, alone[index]) for (index, _), result in found.items())


def test_a_second_request_of_one_thread_is_refused(pipe: Pipeline) -> None:
    stream = pipe.stream("two cats", **SMALL)
    next(stream)
    with pytest.raises(BadRequestError, match="unfinished request"):
        pipe.generate("x", **SMALL)
    with pytest.raises(BadRequestError, match="unfinished request"):
        pipe.close()
    stream.close()
    assert pipe.generate("x", **SMALL).images is not None


def test_an_abandoned_request_gives_its_turn_back(pipe: Pipeline) -> None:
    stream = pipe.stream("two cats", **SMALL)
    next(stream)
    del stream
    gc.collect()
    assert pipe.generate("x", **SMALL).images is not None


@pytest.mark.parametrize("stop", ["closed", "cancelled", "callback fails"])
def test_the_request_after_a_stopped_one_is_as_alone(pipe: Pipeline, stop: str) -> None:
    alone = pipe.generate("a red house", **SMALL)
    longer = {**SMALL, "height": 48, "num_inference_steps": 6}
    if stop == "closed":
        stream = pipe.stream("two cats", **longer)
        for event in stream:
            if isinstance(event, mindomni_rt.StepEvent):
                break
        stream.close()
    elif stop == "cancelled":
        with pytest.raises(GenerationCancelled):
            pipe.generate("two cats", callback=lambda event: not isinstance(event, mindomni_rt.StepEvent), **longer)
    else:
        with pytest.raises(ZeroDivisionError):
            pipe.generate("two cats", callback=lambda _: 1 / 0, **longer)  # type: ignore[arg-type, return-value]
    assert same(pipe.generate("a red house", **SMALL), alone)


@pytest.mark.parametrize("model", ["torch", "fast", "onnx"])
def test_with_closes(model: str) -> None:
    source, options = (BUNDLE, {}) if model == "onnx" else (PARITY, {"fast": model == "fast"})
    with mindomni_rt.load(source, device="cpu", **options) as pipe:  # type: ignore[arg-type]
        pipe.generate("x", **SMALL)
    pipe.close()  # once more does nothing
    with pytest.raises(BadRequestError, match="closed"):
        pipe.generate("x", **SMALL)
