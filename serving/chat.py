"""/v1/chat/completions: questions about pictures, and pictures with the thought that led to them."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest

from mindomni_rt.checks import shown
from mindomni_rt.events import AnswerEvent, Event, GenerationResult, ImageEvent, TextEvent
from mindomni_rt.request import Request, UnderstandRequest

from . import encode
from .errors import bad
from .following import Following, finished, sse, streamed
from .schemas import Answer, ChatBody, Problem
from .server_state import ServerState, state_of
from .translate import Wanted, chat_painting, chat_question, wanted

router = APIRouter(responses={"4XX": {"model": Problem}, "5XX": {"model": Problem}})
_MOST_MESSAGES = 1000


@router.post("/v1/chat/completions", response_model=Answer)
async def completions(body: ChatBody, http: HttpRequest) -> Any:
    """Answers the last user's message; with "image" in `modalities`, paints it.

    The model knows single turns. Earlier messages are not shown to it, and the answer says how many were left out; only
    the conversation's last picture is kept, so that one can ask again about it.
    """
    state = state_of(http)
    state.require_model(body.model)
    form = wanted(body, state.settings)
    prompt, address, left_out = _last_turn(body.messages)
    paint = _paints(body.modalities)
    picture = None if address is None else await state.pictures.at(address)
    given = (body, prompt, state.settings, state.model.defaults, picture)
    request: Request | UnderstandRequest = (
        chat_painting(*given, state.model.recommended()) if paint else chat_question(*given)
    )
    state.log_prompt(http, request.prompt)
    chat = _Chat(request, state, left_out)
    events = Following(state.engine, request, http, form.deadline)
    if form.stream:
        return await streamed(chat.pieces(events, form), http)
    result = await finished(events, chat.see)
    return await asyncio.to_thread(chat.whole, result, form)


def _paints(modalities: Any) -> bool:
    if modalities is None:
        return False
    if not isinstance(modalities, list) or not modalities or not all(m in ("text", "image") for m in modalities):
        raise bad(f"modalities = {shown(modalities)}: expected a list of 'text' and 'image'", "modalities")
    return "image" in modalities


def _last_turn(messages: Any) -> tuple[str, Any, int]:
    """Text of the last message, the address of the conversation's last picture or None, and how many were left out."""
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise bad("messages: expected a list of {role, content}, at least one", "messages")
    if len(messages) > _MOST_MESSAGES:
        raise bad(f"messages: {len(messages)}; expected at most {_MOST_MESSAGES}", "messages", code="limit_exceeded")
    if messages[-1].get("role") != "user":
        raise bad("messages: the last one must be the user's", "messages")
    text, pictures = _content(messages[-1].get("content"))
    if len(pictures) > 1:
        raise bad(f"messages: {len(pictures)} pictures in one message; this model takes one", "messages")
    address = pictures[0] if pictures else None
    for message in reversed(messages[:-1]):
        if address is None and message.get("role") == "user":
            address = next(iter(_content(message.get("content"))[1][-1:]), None)
    return text, address, len(messages) - 1


def _content(content: Any) -> tuple[str, list[Any]]:
    """Text and the pictures' addresses."""
    if isinstance(content, str):
        return content, []
    if not isinstance(content, list):
        raise bad("messages: content is text, or a list of parts", "messages")
    texts, pictures = [], []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image_url":
            found = part.get("image_url")
            pictures.append(found.get("url") or "" if isinstance(found, dict) else found or "")
        else:
            raise bad("messages: expected parts of type 'text' (with text) and 'image_url'", "messages")
    return "\n".join(texts), pictures


class _Chat:
    """One answer, in pieces or whole: both hold the same text."""

    def __init__(self, request: Request | UnderstandRequest, state: ServerState, left_out: int) -> None:
        self._request = request
        self._text = {"content": "", "reasoning_content": ""}
        self._common = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": state.names[0],
            **({"messages_left_out": left_out} if left_out else {}),
        }

    def see(self, event: Event) -> dict[str, str]:
        """Where a piece of text belongs; empty for what is not shown."""
        if not isinstance(event, TextEvent):
            return {}
        text, name = event.text, "content"
        first_of_two = isinstance(self._request, Request) and self._request.cascade and event.round == 0
        if event.kind == "thinking" or first_of_two:
            name = "reasoning_content"
        elif event.kind == "text" and not self._text["content"]:
            text = text.lstrip()  # what stands between </think> and <answer>
        self._text[name] += text
        return {name: text} if text else {}

    def whole(self, result: GenerationResult, form: Wanted) -> dict[str, Any]:
        """Not streamed."""
        message: dict[str, Any] = {"role": "assistant", "content": self._text["content"], **self._images(result, form)}
        if self._text["reasoning_content"]:
            message["reasoning_content"] = self._text["reasoning_content"]
        return {
            "object": "chat.completion",
            **self._common,
            "choices": [{"index": 0, "message": message, "finish_reason": result.finish_reason, "logprobs": None}],
            "usage": encode.chat_usage(result),
            "seed": result.seed,
            "timings": result.timings,
        }

    async def pieces(self, events: Following, form: Wanted) -> AsyncIterator[bytes]:
        """Streamed, up to [DONE]."""
        begun = False
        async for event in events:
            if not begun:  # not earlier: until then an error can have a status of its own
                begun = True
                yield self._chunk({"role": "assistant", "content": ""})
            if piece := self.see(event):
                yield self._chunk(piece)
            if isinstance(event, (ImageEvent, AnswerEvent)):
                images = await asyncio.to_thread(self._images, event.result, form)
                if images:
                    yield self._chunk(images)
                yield self._chunk({}, event.result.finish_reason)
                if form.usage:
                    yield self._chunk(None, usage=encode.chat_usage(event.result))
                yield sse("[DONE]")

    def _chunk(self, delta: dict[str, Any] | None, reason: str | None = None, **more: Any) -> bytes:
        choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}]
        return sse({"object": "chat.completion.chunk", **self._common, "choices": choices, **more})

    @staticmethod
    def _images(result: GenerationResult, form: Wanted) -> dict[str, Any]:
        if not len(result.images):
            return {}
        found = encode.images(result, form)
        return {"images": [{"type": "image_url", "index": i, "image_url": {"url": u}} for i, u in enumerate(found)]}
