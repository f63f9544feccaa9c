"""A request that does not fit the memory, or runs out of it: a named error, and the next request is unharmed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import PARITY

import mindomni_rt
from mindomni_rt import OutOfMemoryError, Pipeline
from mindomni_rt.inputs.images import prepare_image
from mindomni_rt.memory.fit import Fit
from mindomni_rt.memory.layers import Workload

SMALL: dict[str, Any] = dict(width=48, num_inference_steps=2, think=False, seed=1, output="numpy")


def test_what_does_not_fit_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def needed(work: Workload) -> int:
        return work.height * work.width * work.images

    backend = mindomni_rt.load(PARITY, device="cpu").backend
    pipe = Pipeline(backend, PARITY, Fit(device="cpu", dtype=None, free=48 * 48, needs=needed))
    with pytest.raises(OutOfMemoryError, match=r"1 image of 48x64: .* needed .* close other programs"):
        pipe.stream("two cats", height=64, **SMALL)
    with pytest.raises(OutOfMemoryError, match="2 images of 48x48"):
        pipe.stream_batch(["a cat", "two cats"], height=48, num_images=2, **SMALL)
    assert pipe.generate("two cats", height=48, **SMALL).images.shape == (1, 48, 48, 3)
    # Each fits alone and both together do not: one after the other, with the pictures that each has alone.
    loops: list[int] = []
    paint = pipe.paint

    def counted(request: Any, latents: Any, *rest: Any, **more: Any) -> Any:
        loops.append(len(latents))
        return paint(request, latents, *rest, **more)

    monkeypatch.setattr(pipe, "paint", counted)
    both = pipe.generate_batch(["two cats", "two cats"], height=48, **SMALL)
    assert loops == [1, 1] and (both[0].images == pipe.generate("two cats", height=48, **SMALL).images).all()


def test_memory_that_runs_out_during_a_request_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = mindomni_rt.load(PARITY, device="cpu")
    expected = pipe.generate("two cats", height=32, **SMALL).images

    def full(*_: Any) -> Any:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(pipe.backend, "vae", full)
        with pytest.raises(OutOfMemoryError, match=r"answering this request: .*Choose a smaller size"):
            pipe.generate("two cats", height=32, **SMALL)
        patch.setattr(pipe.backend, "vae", lambda *_: (_ for _ in ()).throw(RuntimeError("something else")))
        with pytest.raises(RuntimeError, match="something else"):
            pipe.generate("two cats", height=32, **SMALL)
    assert (pipe.generate("two cats", height=32, **SMALL).images == expected).all()


def test_loading_gives_the_check_to_the_pipeline() -> None:
    fit = mindomni_rt.load(PARITY, device="cpu")._fit
    assert fit is not None and fit.needs is not None
    assert fit.needs(Workload(images=4)) > fit.needs(Workload(height=256, width=256))


def test_each_check_knows_what_is_known_by_then() -> None:
    """The picture before the vision tower runs, the prompt and room for the text before prefill, then its length."""
    known: list[Workload] = []

    def needed(work: Workload) -> int:
        known.append(work)
        return 0

    backend = mindomni_rt.load(PARITY, device="cpu").backend
    pipe = Pipeline(backend, PARITY, Fit(device="cpu", dtype=None, free=1, needs=needed))
    picture = np.zeros((60, 90, 3), np.uint8)
    patches = prepare_image(picture, pipe.config)
    result = pipe.generate("two cats", image=picture, height=48, max_new_tokens=5, **{**SMALL, "think": True})
    guessed, seen, asked, written = known
    assert guessed.patches == (0, 0) and seen.patches == asked.patches == patches.grid[1:]
    assert seen.prompt_tokens == guessed.prompt_tokens + patches.tokens
    (said,) = result.rounds
    assert asked.prompt_tokens == written.prompt_tokens == said.prompt_tokens
    assert asked.max_new_tokens == asked.new_tokens == written.max_new_tokens == 5
    assert written.condition_tokens == said.prompt_tokens + len(said.token_ids) - 1
    known.clear()
    pipe.understand("what is it", picture, max_new_tokens=3)
    seen, asked = known
    assert not seen.paints and not asked.paints and seen.patches == asked.patches == patches.grid[1:]
    assert asked.stages == ("vision", "language") and asked.max_new_tokens == 3
