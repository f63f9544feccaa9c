"""/v1/images/generations and /v1/images/edits."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest

from mindomni_rt.events import ImageEvent, StepEvent, TextEvent
from mindomni_rt.request import Request

from . import encode
from .errors import bad
from .following import Following, finished, sse, streamed
from .schemas import Answer, ImagesBody, Problem
from .server_state import ServerState, state_of
from .translate import Wanted, form_value, painting, wanted

router = APIRouter(responses={"4XX": {"model": Problem}, "5XX": {"model": Problem}})
_FIELDS = 64


@router.post("/v1/images/generations", response_model=Answer)
async def generations(body: ImagesBody, http: HttpRequest) -> Any:
    """Paints from a prompt. With `stream`, server-sent events."""
    state = state_of(http)
    state.require_model(body.model)
    form = wanted(body, state.settings)
    request = painting(body, form, state.settings, state.model.defaults, own=state.model.recommended())
    return await _paint(state, request, form, http, "image_generation")


@router.post("/v1/images/edits", response_model=Answer)
async def edits(http: HttpRequest) -> Any:
    """Changes a picture as the prompt says: a multipart form with the file `image`, else the fields of generations."""
    state = state_of(http)
    body, data = await _form(http, state)
    state.require_model(body.model)
    form = wanted(body, state.settings)
    picture = await state.pictures.of(data)
    request = painting(body, form, state.settings, state.model.defaults, picture, state.model.recommended())
    return await _paint(state, request, form, http, "image_edit")


async def _form(http: HttpRequest, state: ServerState) -> tuple[ImagesBody, bytes]:
    """The fields and the picture of a form. File names and declared types are not used for anything."""
    if not http.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise bad("expected a multipart form with the file 'image'", None, "unsupported_media_type", 415)
    most = 4 * state.settings.max_prompt + 1024
    fields: dict[str, Any] = {}
    files: list[bytes] = []
    try:
        async with http.form(max_files=4, max_fields=_FIELDS, max_part_size=most) as form:
            for name, value in form.multi_items():
                if isinstance(value, UploadFile):
                    if name not in ("image", "image[]"):
                        raise bad(f"{name[:40]}: this model takes one picture, in the field 'image'", name[:40])
                    files.append(await value.read())
                elif name in fields:
                    raise bad(f"{name[:40]} is there twice", name[:40])
                elif value:
                    fields[name] = form_value(name, value)
    except HTTPException as error:
        raise bad(f"the form cannot be read: {error.detail}", None, "invalid_form") from None
    if len(files) != 1:
        raise bad(f"{len(files)} pictures: expected one, as a file in the field 'image'", "image")
    return ImagesBody.model_validate(fields), files[0]


async def _paint(state: ServerState, request: Request, form: Wanted, http: HttpRequest, kind: str) -> Any:
    state.log_prompt(http, request.prompt)
    events = Following(state.engine, request, http, form.deadline)
    if form.stream:
        return await streamed(_pieces(events, request, form, kind), http)
    result = await finished(events)
    found = await asyncio.to_thread(encode.images, result, form)
    name = "url" if form.as_url else "b64_json"
    words = {"revised_prompt": result.answer} if request.think else {}
    return {
        "created": int(time.time()),
        "data": [{name: text, "seed": (result.seed or 0) + i, **words} for i, text in enumerate(found)],
        **_looks(request, form),
        "usage": encode.images_usage(result),
        "thinking": result.thinking,
        "finish_reason": result.finish_reason,
        "timings": result.timings,
    }


def _looks(request: Request, form: Wanted) -> dict[str, str]:
    """Fields that OpenAI's answers carry about an image."""
    size = f"{request.width}x{request.height}"
    return {"background": "opaque", "output_format": form.kind, "quality": "auto", "size": size}


async def _pieces(events: Following, request: Request, form: Wanted, kind: str) -> AsyncIterator[bytes]:
    """OpenAI's two events, and two of our own between them: text as it is written, and steps."""
    sent = 0
    common = {**_looks(request, form), "created_at": int(time.time())}
    plain = Wanted(deadline=form.deadline, kind=form.kind, quality=form.quality)  # events have base64 text alone
    async for event in events:
        if isinstance(event, TextEvent):
            name = f"{kind}.text"
            yield sse({"type": name, "kind": event.kind, "round": event.round, "delta": event.text}, name)
        elif isinstance(event, StepEvent):
            name = f"{kind}.step"
            yield sse({"type": name, "step": event.step, "total": event.total}, name)
            if event.preview and sent < form.partial_images:
                name = f"{kind}.partial_image"
                for index, text in enumerate(await asyncio.to_thread(encode.previews, event.preview, plain)):
                    about = {"partial_image_index": sent, "image_index": index, **common}
                    yield sse({"type": name, "b64_json": text, **about}, name)
                sent += 1
        elif isinstance(event, ImageEvent):
            result = event.result
            found = await asyncio.to_thread(encode.images, result, plain)
            for index, text in enumerate(found):
                name = f"{kind}.completed"
                about = {"image_index": index, "seed": (result.seed or 0) + index, **common}
                about |= {"thinking": result.thinking, "revised_prompt": result.answer} if request.think else {}
                # Counted once: clients add up what they get.
                about |= {"usage": encode.images_usage(result)} if index == len(found) - 1 else {}
                yield sse({"type": name, "b64_json": text, **about}, name)
