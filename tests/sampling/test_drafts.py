"""Drafts: the text, its hidden states and its draws are those of one token at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import PARITY, relative
from hypothesis import given, settings
from hypothesis import strategies as st

import mindomni_rt
from mindomni_rt import Pipeline
from mindomni_rt.backends.base import Array, LanguageRequest
from mindomni_rt.model.tiny import write_random_checkpoint
from mindomni_rt.sampling.decode import generate_tokens
from mindomni_rt.sampling.drafts import PromptLookup, accepted


@pytest.fixture(scope="module")
def pipes(bundles: Callable[[str], Path]) -> dict[str, Pipeline]:
    found = {name: mindomni_rt.load(PARITY, device="cpu", fast=name == "fast") for name in ("plain", "fast")}
    return {**found, "onnx": mindomni_rt.load(bundles("fp32"), device="cpu")}


def request(ids: list[int], count: int, **more: object) -> LanguageRequest:
    return LanguageRequest(
        token_ids=np.array(ids),
        positions=np.tile(np.arange(len(ids)), (3, 1)),
        next_position=len(ids),
        max_new_tokens=count,
        **more,  # type: ignore[arg-type]
    )


def run(pipe: Pipeline, asked: LanguageRequest) -> tuple[list[int], Array]:
    """Tokens and hidden states."""
    session = pipe.backend.language(asked)
    tokens = list(generate_tokens(session))
    return tokens, pipe.backend.numpy(session.hidden(len(tokens)))


def reference(tokens: list[int], count: int) -> list[int]:
    """The definition, slowly."""
    for size in (3, 2, 1):
        for start in range(len(tokens) - size - 1, -1, -1):
            if len(tokens) > size and tokens[start : start + size] == tokens[-size:]:
                return tokens[start + size : start + size + count]
    return []


@given(tokens=st.lists(st.integers(0, 3), min_size=1, max_size=40), count=st.integers(1, 6), cut=st.integers(0, 39))
@settings(max_examples=200, deadline=None)
def test_drafts_by_definition(tokens: list[int], count: int, cut: int) -> None:
    lookup = PromptLookup(tokens[: cut % len(tokens)])
    for token in tokens[cut % len(tokens) :]:
        lookup.push(token)
    assert lookup.draft(count) == reference(tokens, count)


def test_acceptance_by_hand() -> None:
    assert accepted([], [5]) == 0
    assert accepted([1, 2, 3], [1, 2, 3, 4]) == 3
    assert accepted([1, 2, 3], [1, 9, 3, 4]) == 1
    assert accepted([1], [2, 1]) == 0


@settings(max_examples=25, deadline=None)
@given(
    ids=st.lists(st.integers(5, 12), min_size=1, max_size=12),
    count=st.integers(1, 24),
    draft=st.integers(1, 6),
    penalty=st.sampled_from([1.0, 1.3]),
    temperature=st.sampled_from([0.0, 0.0, 0.7]),
    stop=st.integers(0, 23),
)
def test_the_text_is_unchanged(
    pipes: dict[str, Pipeline], ids: list[int], count: int, draft: int, penalty: float, temperature: float, stop: int
) -> None:
    uniforms = np.random.default_rng(count).random(count)
    options = dict(repetition_penalty=penalty, temperature=temperature, uniforms=uniforms)
    tokens, expected = run(pipes["plain"], request(ids, count, **options))
    if stop < len(tokens):  # a token of the text ends it
        options["eos_token_ids"] = (tokens[stop],)
        tokens, expected = run(pipes["plain"], request(ids, count, **options))
    for pipe in pipes.values():
        guessed, hidden = run(pipe, request(ids, count, draft_tokens=draft, **options))
        assert guessed == tokens and relative(hidden, expected) < 1e-5


def test_drafts_are_accepted(pipes: dict[str, Pipeline], monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that repeats itself needs fewer passes than tokens."""
    backend = pipes["plain"].backend
    passes: list[int] = []
    forward = backend.model.language.forward  # type: ignore[attr-defined]

    def counted(x, *rest):  # type: ignore[no-untyped-def]
        passes.append(x.shape[1])
        return forward(x, *rest)

    monkeypatch.setattr(backend.model.language, "forward", counted)  # type: ignore[attr-defined]
    found = {}
    for draft in (0, 4):
        passes.clear()
        tokens = list(generate_tokens(backend.language(request([7, 8, 9] * 4, 60, draft_tokens=draft))))
        found[draft] = (tokens, len(passes))
    assert found[0][0] == found[4][0] and found[0][1] == 60
    assert found[4][1] < 60, "this random model fell into no loop: choose another prompt"


def test_drafts_through_generate(pipes: dict[str, Pipeline], tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path)
    options = dict(height=32, width=32, num_inference_steps=2, max_new_tokens=30, seed=3, output="numpy")
    for pipe in (*pipes.values(), mindomni_rt.load(tmp_path, device="cpu", fast=True)):
        plain = pipe.generate("two cats and two cats", **options)
        guessed = pipe.generate("two cats and two cats", draft_tokens=5, **options)
        assert plain.token_ids == guessed.token_ids and relative(guessed.latents, plain.latents) < 1e-5
