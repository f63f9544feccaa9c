"""Every option on every backend gives what the reference gives."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import PARITY, relative

import mindomni_rt
from mindomni_rt import BadRequestError, GenerationCancelled, ImageEvent, Pipeline, StepEvent, TextEvent
from mindomni_rt.backends.base import ADAPTERS, OPTIONAL, PROMPT_BATCHES
from mindomni_rt.backends.compiled.backend import CompiledBackend

SMALL: dict[str, Any] = dict(height=32, width=48, num_inference_steps=5, max_new_tokens=12, seed=1, output="numpy")
OPTIONS: list[dict[str, Any]] = [
    {},
    {"solver": "multistep"},
    {"guidance_interval": (0.2, 0.7)},
    {"guidance_interval": (0.2, 0.7), "solver": "multistep", "first_step": "condition_only", "num_images": 3},
    {"guidance_interval": (0.0, 0.5), "guidance_scale": 1.0},
    {"num_images": 3, "temperature": 1.0},
    {"first_step": "condition_only"},
    {"draft_tokens": 4},
    {"draft_tokens": 3, "temperature": 0.7},
    {"cascade": True, "draft_tokens": 2},
    {"think": False, "guidance_scale": 1.0},
]
BACKENDS = ("torch fast", "onnx")


@pytest.fixture(scope="module")
def reference() -> Pipeline:
    return mindomni_rt.load(PARITY, device="cpu")


@pytest.fixture(scope="module", params=BACKENDS)
def pipe(request: pytest.FixtureRequest, bundles: Callable[[str], Path]) -> Pipeline:
    if request.param == "onnx":
        return mindomni_rt.load(bundles("fp32"), device="cpu")
    return mindomni_rt.load(PARITY, device="cpu", fast=True)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_an_option_is_the_references(reference: Pipeline, pipe: Pipeline, options: dict[str, Any]) -> None:
    expected, found = (p.generate("two cats and two cats", **{**SMALL, **options}) for p in (reference, pipe))
    assert found.token_ids == expected.token_ids and found.text == expected.text
    assert relative(found.latents, expected.latents) < 1e-4
    assert np.abs(found.images - expected.images).max() < 1 / 255


def test_lossy_options_change_the_image(pipe: Pipeline) -> None:
    plain, *others = (
        pipe.generate("two cats", **SMALL, **options)
        for options in ({}, {"solver": "multistep"}, {"guidance_interval": (0.2, 0.7)})
    )
    assert all(relative(other.latents, plain.latents) > 1e-3 for other in others)


def test_previews_are_the_references(reference: Pipeline, pipe: Pipeline) -> None:
    previews = []
    for each in (reference, pipe):
        events = list(each.stream("two cats", preview_every=2, solver="multistep", **SMALL))
        steps = [e for e in events if isinstance(e, StepEvent)]
        assert [e.step for e in steps if e.preview] == [2, 4] and steps[-1].total == 5
        previews.append([np.asarray(e.preview[0], int) for e in steps if e.preview])
        plain = each.generate("two cats", solver="multistep", **SMALL)
        assert isinstance(events[-1], ImageEvent) and np.array_equal(events[-1].result.images, plain.images)
    for a, b in zip(*previews, strict=True):
        assert np.abs(a - b).max() <= 1


@pytest.mark.parametrize("kind", [TextEvent, StepEvent])
def test_cancelling_in_the_middle(reference: Pipeline, pipe: Pipeline, kind: type) -> None:
    for options in ({}, {"draft_tokens": 3}):
        cancel, seen = threading.Event(), []
        with pytest.raises(GenerationCancelled):
            for event in pipe.stream("two cats", cancel=cancel, **SMALL, **options):
                seen.append(event)
                if sum(isinstance(e, kind) for e in seen) == 2:
                    cancel.set()
        assert sum(isinstance(e, kind) for e in seen) == 2 and not isinstance(seen[-1], ImageEvent)
    found, expected = pipe.generate("two cats", **SMALL), reference.generate("two cats", **SMALL)
    assert relative(found.latents, expected.latents) < 1e-4  # nothing of the cancelled requests is left


def test_missing_capabilities_are_one_clear_error(reference: Pipeline, pipe: Pipeline) -> None:
    values = {"step_cache": 0.1, "draft_tokens": 2, "first_step": "condition_only"}
    assert set(values) == set(OPTIONAL)
    for each in (reference, pipe):
        assert each.backend.capabilities <= {*OPTIONAL, ADAPTERS, PROMPT_BATCHES}
        for name in set(OPTIONAL) - each.backend.capabilities:
            with pytest.raises(BadRequestError, match=rf"^{name}: backend '.*' on this device has no such option"):
                each.stream("two cats", **SMALL, **{name: values[name]})


def test_a_bundle_without_the_first_step_graph_says_so_before_any_work(bundles: Callable[[str], Path]) -> None:
    pipe = mindomni_rt.load(bundles("fp32"), device="cpu")
    assert "first_step" in pipe.backend.capabilities
    manifest = pipe.backend.manifest
    graphs = {name: graph for name, graph in manifest.graphs.items() if name != "denoiser_first"}
    pipe.backend = CompiledBackend(pipe.backend.runner, replace(manifest, graphs=graphs))
    assert pipe.backend.capabilities == {"draft_tokens"}
    with pytest.raises(BadRequestError, match=r"first_step: .*--first-step condition_only"):
        pipe.stream("a red circle", first_step="condition_only")
