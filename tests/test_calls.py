"""What the calls of a pipeline refuse, and that a result agrees with its own round."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mindomni_rt
from mindomni_rt import AsyncPipeline, BadRequestError, Pipeline

BUNDLE = Path(__file__).parents[1] / "assets" / "shapes-world-bundle"


@pytest.fixture(scope="module")
def pipe() -> Iterator[Pipeline]:
    with mindomni_rt.load(BUNDLE, device="cpu") as loaded:
        yield loaded


def test_an_edit_needs_a_picture(pipe: Pipeline) -> None:
    with pytest.raises(BadRequestError, match="image None"):
        pipe.edit(None, "the same, but red")
    with pytest.raises(BadRequestError, match="image None"):
        asyncio.run(AsyncPipeline(pipe).edit(None, "the same, but red"))


def test_an_answer_agrees_with_its_round(pipe: Pipeline) -> None:
    result = pipe.understand("what is this?", max_new_tokens=48, seed=0)
    assert "<think>" in result.text
    (written,) = result.rounds
    assert (result.thinking, result.answer) == (written.thinking, written.answer)
    assert result.thinking and result.answer and "<" not in result.thinking + result.answer


@pytest.mark.parametrize("progress", [3, "yes", None])
def test_progress_is_true_or_false(pipe: Pipeline, progress: Any) -> None:
    with pytest.raises(BadRequestError, match="progress"):
        pipe.generate("three yellow circles", progress=progress)


def test_a_pipeline_says_what_it_is(pipe: Pipeline) -> None:
    assert repr(pipe) == "<Pipeline shapes-world-bundle: onnx, cpu, float32>"


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("data:image/png;base64,@@@", "image data:image/png;base64: its text after the comma is no base64"),
        ("", "image '': is an empty text"),
        ("A" * 60, "is no file, and its text is base64, but holds no picture"),
    ],
)
def test_a_picture_is_refused_in_its_own_words(pipe: Pipeline, image: str, message: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        pipe.edit(image, "the same, but red")
    assert message in str(caught.value)


def test_settings_of_what_is_no_picture_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "embed.py"
    path.write_text("import mindomni_rt")
    with pytest.raises(BadRequestError) as caught:
        mindomni_rt.read_settings(path)
    assert str(caught.value) == f"image {path} cannot be read: expected PNG, JPEG or WebP"


def test_a_budget_that_is_the_cause_is_named() -> None:
    with pytest.raises(mindomni_rt.OutOfMemoryError, match=r"memory_budget is 1000000 bytes.*raise memory_budget"):
        mindomni_rt.load(BUNDLE, device="cpu", memory_budget="1MB")


def test_names_of_other_types_are_refused(pipe: Pipeline) -> None:
    result = pipe.understand("what is this?", max_new_tokens=1)
    with pytest.raises(BadRequestError, match="path None"):
        result.save(None)  # type: ignore[arg-type]
    with pytest.raises(BadRequestError, match="adapter 3"):
        pipe.load_adapter(3)  # type: ignore[arg-type]
