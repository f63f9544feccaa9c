"""/v1/chat/completions through OpenAI's own client."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

import mindomni_rt
from serving.serving_tools import PROMPT, SMALL, Served, data_uri, decoded, png, same

PICTURE = data_uri(png())
ASK = [{"type": "text", "text": "what is this?"}, {"type": "image_url", "image_url": {"url": PICTURE, "detail": "low"}}]


def chat(client: openai.OpenAI, content: Any, **options: Any) -> Any:
    messages = content if isinstance(content, list) and "role" in content[0] else [{"role": "user", "content": content}]
    return client.chat.completions.create(model="shapes-world-bundle", messages=messages, **options)


def test_a_question_about_a_picture(client: openai.OpenAI, pipe: mindomni_rt.Pipeline) -> None:
    answer = chat(client, ASK, max_completion_tokens=9)
    alone = pipe.understand("what is this?", image=png(), max_new_tokens=9)
    assert answer.choices[0].message.content == alone.text.lstrip() != ""
    assert answer.choices[0].finish_reason == alone.finish_reason
    assert answer.usage.completion_tokens == len(alone.token_ids)
    assert answer.usage.prompt_tokens == alone.rounds[0].prompt_tokens > 20
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    assert chat(client, "1 + 1?", max_tokens=4).usage.completion_tokens <= 4


def test_streamed_text_is_the_whole_text(client: openai.OpenAI) -> None:
    whole = chat(client, ASK, max_tokens=9)
    chunks = list(chat(client, ASK, max_tokens=9, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].usage == whole.usage
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    assert len({c.id for c in chunks}) == 1


def test_painting_with_its_thought(client: openai.OpenAI, pipe: mindomni_rt.Pipeline) -> None:
    alone = pipe.generate(PROMPT, seed=7, **SMALL)
    paint: dict[str, Any] = dict(modalities=["text", "image"], seed=7)
    message = chat(client, PROMPT, **paint).choices[0].message
    assert message.reasoning_content.strip() == alone.thinking and message.content.strip() == alone.answer
    url = message.images[0]["image_url"]["url"]
    assert same(decoded(url.partition(",")[2]), alone.images[0]) and url.startswith("data:image/png;base64,")
    chunks = list(chat(client, PROMPT, **paint, stream=True))
    deltas = [c.choices[0].delta for c in chunks]
    assert "".join(getattr(d, "reasoning_content", None) or "" for d in deltas) == message.reasoning_content
    assert "".join(d.content or "" for d in deltas) == message.content
    images = [d.images for d in deltas if getattr(d, "images", None)]
    assert images == [message.images]


def test_cascade_answers_once(client: openai.OpenAI, pipe: mindomni_rt.Pipeline) -> None:
    """The first of two rounds is part of the thinking."""
    alone = pipe.generate(PROMPT, seed=7, cascade=True, **SMALL)
    extra = {"cascade": True}
    message = chat(client, PROMPT, modalities=["image"], seed=7, extra_body=extra).choices[0].message
    assert message.content.strip() == alone.answer and alone.rounds[0].thinking in message.reasoning_content


def test_editing_and_sizes(client: openai.OpenAI, pipe: mindomni_rt.Pipeline) -> None:
    extra = {"num_inference_steps": 2, "think": False}
    made = chat(client, ASK, modalities=["image"], seed=1, extra_body=extra).choices[0].message
    assert decoded(made.images[0]["image_url"]["url"].partition(",")[2]).size == (96, 96)
    extra["size"] = "32x64"
    made = chat(client, PROMPT, modalities=["image"], seed=1, extra_body=extra).choices[0].message
    assert decoded(made.images[0]["image_url"]["url"].partition(",")[2]).size == (32, 64)


def test_a_conversation(client: openai.OpenAI, pipe: mindomni_rt.Pipeline) -> None:
    """The last question about the last picture; what the model is not shown is reported."""
    turns = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": ASK},
        {"role": "assistant", "content": "noise"},
        {"role": "user", "content": "which colour?"},
    ]
    answer = chat(client, turns, max_tokens=6)
    alone = pipe.understand("which colour?", image=png(), max_new_tokens=6)
    assert answer.choices[0].message.content == alone.text.lstrip() and answer.messages_left_out == 3


def test_the_asynchronous_client(served: Served) -> None:
    async def both() -> tuple[Any, str]:
        async with served.asynchronous() as client:
            options: dict[str, Any] = dict(model="shapes-world-bundle", max_tokens=6)
            options["messages"] = [{"role": "user", "content": ASK}]
            whole = await client.chat.completions.create(**options)
            stream = await client.chat.completions.create(**options, stream=True)
            return whole, "".join([c.choices[0].delta.content or "" async for c in stream])

    whole, text = asyncio.run(both())
    assert whole.choices[0].message.content == text


@pytest.mark.parametrize(
    ("content", "options", "param", "words"),
    [
        ("", {}, "prompt", "the prompt is empty"),
        (" ", {"modalities": ["image"]}, "prompt", "the prompt is empty"),
        ("x", {"n": 2}, "n", "no such option"),
        ("x", {"tools": [{"type": "function"}]}, "tools", "no such option"),
        ("x", {"top_p": 0.5}, "top_p", "no such option"),
        ("x", {"response_format": {"type": "json_object"}}, "response_format", "no such option"),
        ("x", {"temperature": -1}, "temperature", "finite number"),
        ("x", {"max_tokens": 10**6}, "max_new_tokens", "at most 4096"),
        ("x", {"modalities": ["audio"]}, "modalities", "'text' and 'image'"),
        ("x", {"extra_body": {"think": False}}, "think", "no option 'think'"),
        ("x", {"extra_body": {"image": "/etc/passwd"}}, "image", "no option 'image'"),
        ([{"role": "assistant", "content": "x"}], {}, "messages", "the last one"),
        ([{"role": "user", "content": [{"type": "audio"}]}], {}, "messages", "expected parts"),
        ([{"role": "user", "content": [*ASK, *ASK]}], {}, "messages", "2 pictures"),
    ],
)
def test_mistakes(client: openai.OpenAI, content: Any, options: dict[str, Any], param: str | None, words: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, content, **options)
    assert words in str(caught.value) and caught.value.param == param, caught.value


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("https://example.com/a.png", "downloads no pictures"),
        ("file:///etc/passwd", "downloads no pictures"),
        ("/etc/passwd", "downloads no pictures"),
        ("data:image/png,abc", "expected a data URI"),
        ("data:image/png;base64,###", "not base64"),
        ("data:image/png;base64,AAAA", "cannot be read"),
        (None, "expected a data URI"),
    ],
)
def test_addresses(client: openai.OpenAI, url: Any, words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words):
        chat(client, [ASK[0], {"type": "image_url", "image_url": {"url": url}}])
