"""Tokenizers and templates that a checkpoint may hold and that no chat survives: each is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import PARITY

import mindomni_rt
from mindomni_rt.errors import BadCheckpointError
from mindomni_rt.inputs.prompts import Chat, understand_messages


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(PARITY / "mllm", tmp_path / "mllm"))


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")


def replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


TWICE = replace({"String": "e"}, "ee")


@pytest.mark.parametrize(
    "normalizer",
    [
        {"type": "Sequence", "normalizers": [TWICE] * 40},  # 2^40 letters
        {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": [TWICE] * 4}] * 2},
        replace({"Regex": ""}, "x" * 10_000),
        {"type": "Prepend", "prepend": "x" * 10_000},
    ],
)
def test_texts_that_grow_are_refused(folder: Path, normalizer: dict[str, Any]) -> None:
    edit(folder / "tokenizer.json", lambda data: data.update(normalizer=normalizer))
    with pytest.raises(BadCheckpointError, match="64 times as long"):
        Chat(folder)


@pytest.mark.parametrize(
    "normalizer",
    [None, {"type": "NFC"}, replace({"String": " "}, "▁"), {"type": "Sequence", "normalizers": [TWICE] * 6}],
)
def test_texts_that_grow_a_little_are_not(folder: Path, normalizer: dict[str, Any] | None) -> None:
    """Six doublings are 64 times, the limit. The second is common in published tokenizers."""
    edit(folder / "tokenizer.json", lambda data: data.update(normalizer=normalizer))
    assert Chat(folder).encode(understand_messages("hello", image=False))


def test_a_panic_of_the_library_is_named(folder: Path) -> None:
    """Oniguruma gives up after ten million steps, and tokenizers panics: an exception below Exception."""
    split = {"type": "Split", "pattern": {"Regex": r"(\w+\s?)+$"}, "behavior": "Isolated", "invert": False}
    edit(folder / "tokenizer.json", lambda data: data.update(pre_tokenizer=split))
    with pytest.raises(BadCheckpointError, match="does not encode"):
        Chat(folder).encode(understand_messages("a few words more", image=False))


def test_a_template_that_says_nothing(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ nothing }}", encoding="utf-8")
    with pytest.raises(BadCheckpointError, match="makes 0 tokens of a chat"):
        Chat(folder).encode(understand_messages("hello", image=False))


def test_tokens_that_the_model_has_not(tmp_path: Path) -> None:
    """The released code ends in a bare IndexError of the embedding."""
    checkpoint = Path(shutil.copytree(PARITY, tmp_path / "checkpoint"))

    def foreign(data: dict[str, Any]) -> None:
        token = {**data["added_tokens"][-1], "id": 9999, "content": "hello"}
        data["added_tokens"].append(token)

    edit(checkpoint / "mllm" / "tokenizer.json", foreign)
    with pytest.raises(BadCheckpointError, match="the model has 330"):
        mindomni_rt.load(checkpoint, device="cpu").understand("hello", max_new_tokens=1)
