"""What the tests of this folder ask of a device, without one: they run, and they tell right from wrong."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import PARITY

import mindomni_rt


@pytest.fixture(scope="module")
def asked() -> ModuleType:
    """The tests of `test_fast_cuda` as functions."""
    spec = importlib.util.spec_from_file_location("asked", Path(__file__).with_name("test_fast_cuda.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def found(latents: float, tokens: tuple[int, ...] = (1,)) -> Any:
    """A pipeline whose latents are as far from 1 as the given number is."""
    result = SimpleNamespace(latents=np.full((1, 4, 2, 2), latents), token_ids=tokens)
    return SimpleNamespace(generate=lambda *_, **__: result)


@pytest.mark.parametrize(
    ("ours", "baseline", "right"),
    [(0.0119, 0.01, True), (0.0121, 0.01, False), (0.021, 0.021, False), (float("nan"), 0.01, False)],
)
def test_sixteen_bits_by_their_distance_from_float32(
    asked: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ours: float, baseline: float, right: bool
) -> None:
    """No farther than 1.2 times the baseline's, and within the bound (0.02)."""

    def load(path: Path, device: str, dtype: str, **_: Any) -> Any:
        return found(1.0 if dtype == "float32" else 1 + (ours if device == "cuda" else baseline))

    monkeypatch.setattr(mindomni_rt, "load", load)
    check: Callable[[], None] = lambda: asked.test_other_precisions_by_their_distance_from_float32(  # noqa: E731
        tmp_path, None, "bfloat16", 2e-2
    )
    if right:
        check()
    else:
        with pytest.raises(AssertionError):
            check()


def test_float32_by_its_text_and_latents(asked: ModuleType) -> None:
    right = found(1.0)
    asked.test_float32_is_the_references(right, found(1 + 9e-5), {})
    asked.test_requests_in_a_row(right, found(1 + 9e-5))
    for wrong in (found(1 + 2e-4), found(1.0, (2,)), found(float("nan"))):
        with pytest.raises(AssertionError):
            asked.test_float32_is_the_references(right, wrong, {})
        with pytest.raises(AssertionError):
            asked.test_requests_in_a_row(right, wrong)


def test_they_run(asked: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On the CPU's fast path in place of a device's."""
    real = mindomni_rt.load

    def load(path: Path, device: str, **how: Any) -> Any:
        return real(path, device="cpu", **{**how, "fast": True} if device == "cuda" else how)

    monkeypatch.setattr(mindomni_rt, "load", load)
    slow, exact = load(PARITY, "cpu"), load(PARITY, "cuda", dtype="float32")
    asked.test_float32_is_the_references(slow, exact, {"draft_tokens": 4})
    asked.test_requests_in_a_row(slow, exact)
    asked.test_other_precisions_by_their_distance_from_float32(tmp_path, "decoder=int8", "bfloat16", 6e-2)
    asked.test_nothing_is_left_behind(exact)
