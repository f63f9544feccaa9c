"""The fast path on a CUDA device: graphs, kernels and precisions against the reference on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import PARITY, relative

import mindomni_rt
from mindomni_rt import Pipeline
from mindomni_rt.judgement import judged
from mindomni_rt.model.tiny import write_random_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this PyTorch finds no CUDA device"),
]
SMALL: dict[str, Any] = dict(height=64, width=96, num_inference_steps=6, max_new_tokens=24, seed=1, output="numpy")


@pytest.fixture(scope="module")
def slow() -> Pipeline:
    return mindomni_rt.load(PARITY, device="cpu")


@pytest.fixture(scope="module")
def exact() -> Pipeline:
    return mindomni_rt.load(PARITY, device="cuda", dtype="float32")


@pytest.mark.parametrize(
    "options",
    [{}, {"num_images": 2}, {"temperature": 1.0}, {"first_step": "condition_only"}, {"draft_tokens": 4},
     {"guidance_interval": (0.0, 0.5), "solver": "multistep"}],
    ids=str,
)  # fmt: skip
def test_float32_is_the_references(slow: Pipeline, exact: Pipeline, options: dict[str, Any]) -> None:
    a, b = slow.generate("two cats", **SMALL, **options), exact.generate("two cats", **SMALL, **options)
    assert a.token_ids == b.token_ids and relative(b.latents, a.latents) < 1e-4


def test_requests_in_a_row(slow: Pipeline, exact: Pipeline) -> None:
    """Graphs are replayed with other prompts of other lengths."""
    for prompt in ("two cats", "a much longer prompt, with many more words", "x", "two cats"):
        a, b = slow.generate(prompt, **SMALL), exact.generate(prompt, **SMALL)
        assert a.token_ids == b.token_ids and relative(b.latents, a.latents) < 1e-4


@pytest.mark.parametrize(
    ("precision", "dtype", "bound"),
    [(None, "bfloat16", 2e-2), (None, "float16", 2e-2), ("decoder=int8", "bfloat16", 6e-2)],
)
def test_other_precisions_by_their_distance_from_float32(
    tmp_path: Any, precision: str | None, dtype: str, bound: float
) -> None:
    """No farther than 1.2 times the same precision computed by the plain implementation on the CPU, and a bound."""
    write_random_checkpoint(tmp_path)
    options = {**SMALL, "think": False}

    def latents(device: str, **how: Any) -> Any:
        return mindomni_rt.load(tmp_path, device=device, **how).generate("two cats", **options).latents

    exact = latents("cpu", dtype="float32")
    baseline = relative(latents("cpu", dtype=dtype, precision=precision, fast=True), exact)
    found = judged(relative(latents("cuda", dtype=dtype, precision=precision), exact), bound, baseline)
    assert found["right"], found


def test_nothing_is_left_behind(exact: Pipeline) -> None:
    """A request like the last one allocates nothing that stays."""
    for _ in range(2):
        exact.generate("two cats", **SMALL)
    before = torch.cuda.memory_allocated()
    images = exact.generate("two cats", **SMALL).images
    assert torch.cuda.memory_allocated() == before and np.isfinite(images).all()
