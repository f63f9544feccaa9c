"""Chat, tokens and tags: against the parity cases' token ids, transformers, and all ways a tag can be broken."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import CASES, PARITY, load_case
from hypothesis import given, settings
from hypothesis import strategies as st

from mindomni_rt.errors import BadCheckpointError, BadRequestError
from mindomni_rt.inputs.prompts import (
    Chat,
    TextStream,
    ThoughtParser,
    cascade_prompt,
    generate_messages,
    split_thought,
    understand_messages,
)


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(PARITY / "mllm")


@pytest.mark.parametrize("name", [c for c in CASES if "think" in c or "understand" in c])
def test_token_ids_of_the_released_code(chat: Chat, name: str) -> None:
    case, arrays = load_case(name)
    image = case["image"] is not None
    if case.get("mode") == "understand":
        messages = understand_messages(case["text"], image)
    else:
        messages = generate_messages(case["text"], case["think"], image)
    expected = arrays["generate_input_0.input_ids"][0].tolist()
    assert chat.encode(messages, [expected.count(328)] if image else []) == expected


@pytest.mark.parametrize("name", ["t2i_plain", "t2i_long_rope"])
def test_token_counts_without_thinking(chat: Chat, name: str) -> None:
    case, _ = load_case(name)
    lengths = [
        len(chat.encode(generate_messages(text, think=False))) for text in (case["text"], case["negative_prompt"])
    ]
    assert lengths == case["prefix_tokens"]


def test_template_renders_as_transformers_does(chat: Chat) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = generate_messages("two cats", think=True, image=True)
    expected, _ = render_jinja_template([messages], chat_template=chat.template, add_generation_prompt=True)
    assert chat.render(messages) == expected[0]


def test_slow_tokenizer_files_give_the_same_ids(chat: Chat, tmp_path: Path) -> None:
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "chat_template.json"):
        shutil.copy(PARITY / "mllm" / name, tmp_path / name)
    messages = generate_messages("a red circle, (3 + 6) = 9; ünïcode 猫 🐈\n\n it's", think=True)
    slow = Chat(tmp_path)
    assert slow.encode(messages) == chat.encode(messages)
    ids = slow.encode(messages)
    assert slow.decode(ids) == chat.decode(ids)


@pytest.mark.parametrize("where", ["jinja", "config", "list"])
def test_every_place_of_a_template(chat: Chat, tmp_path: Path, where: str) -> None:
    shutil.copy(PARITY / "mllm" / "tokenizer.json", tmp_path)
    if where == "jinja":
        (tmp_path / "chat_template.jinja").write_text(chat.template)
    else:
        template = chat.template if where == "config" else [{"name": "default", "template": chat.template}]
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    messages = generate_messages("x", think=False)
    assert Chat(tmp_path).encode(messages) == chat.encode(messages)


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpointError, match=r"tokenizer\.json"):
        Chat(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BadCheckpointError, match="does not load"):
        Chat(tmp_path)
    shutil.copy(PARITY / "mllm" / "tokenizer.json", tmp_path)
    with pytest.raises(BadCheckpointError, match="chat_template"):
        Chat(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(BadCheckpointError, match="does not parse"):
        Chat(tmp_path).render(generate_messages("x", think=False))


def test_a_template_cannot_reach_python(tmp_path: Path) -> None:
    shutil.copy(PARITY / "mllm" / "tokenizer.json", tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(BadCheckpointError, match="template failed"):
        Chat(tmp_path).render([])


def test_placeholders_in_a_prompt_are_refused(chat: Chat) -> None:
    with pytest.raises(BadRequestError, match="placeholder"):
        chat.encode(generate_messages("<|image_pad|>", think=False))


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, 329), max_size=40))
def test_stream_adds_up_to_the_whole(ids: list[int]) -> None:
    chat = Chat(PARITY / "mllm")
    stream = TextStream(chat)
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.finish() == chat.decode(ids)


def test_stream_holds_back_half_a_character(chat: Chat) -> None:
    ids = chat.tokenizer.encode("é", add_special_tokens=False).ids
    assert len(ids) == 2
    stream = TextStream(chat)
    assert [stream.push(i) for i in ids] == ["", "é"]


@pytest.mark.parametrize(
    ("text", "thinking", "answer"),
    [
        ("<think>3+6=9</think><answer>a cat</answer>", "3+6=9", "a cat"),
        ("<think>3+6=9</think>\n <answer> a cat", "3+6=9", "a cat"),
        ("<think>no end", "no end", ""),
        ("<think>a<answer>b", "a", "b"),
        ("no tags at all", "", "no tags at all"),
        ("", "", ""),
        ("a < b <thin", "", "a < b <thin"),
        ("<answer>only</answer> tail", "", "only"),
        ("<think></think><answer></answer>", "", ""),
        ("x <think>y</think> z", "y", ""),
        ("1 < 2 <<think>t</think><answer>a</answer>", "t", "a"),
    ],
)
def test_thoughts(text: str, thinking: str, answer: str) -> None:
    assert split_thought(text) == (thinking, answer)


@settings(max_examples=200, deadline=None)
@given(
    text=st.lists(st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", "<", "</", "a b", ">"])).map(
        "".join
    ),
    size=st.integers(1, 7),
)
def test_tags_may_be_split_anywhere(text: str, size: int) -> None:
    def kinds(pieces: list[tuple[str, str]]) -> str:
        return "".join(f"{kind[0]}{letter}" for kind, piece in pieces for letter in piece)

    whole, split = ThoughtParser(), ThoughtParser()
    chunks = [text[i : i + size] for i in range(0, len(text), size)]
    streamed = [p for chunk in chunks for p in split.push(chunk)] + split.finish()
    assert kinds(streamed) == kinds(whole.push(text) + whole.finish())


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ("<think>t</think><answer>a cat</answer>", "a cat</answer>"),  # the released code keeps the closing tag
        ("<think>t</think>", "t"),
        ("<think>t", "t"),
        ("nothing", "nothing"),
    ],
)
def test_second_round(text: str, prompt: str) -> None:
    assert cascade_prompt(text) == prompt
