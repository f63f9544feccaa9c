"""OpenAI's bodies → `Request` and `UnderstandRequest`. What these refuse, they refuse with their own words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from mindomni_rt.checkpoint.config import PUBLISHED, RecommendedConfig
from mindomni_rt.checks import Check, Flag, Number, OneOf, Whole, shown
from mindomni_rt.errors import BadRequestError
from mindomni_rt.options import parse_size
from mindomni_rt.request import Request, UnderstandRequest, as_request, edit_size

from .errors import bad
from .pictures import Picture
from .schemas import Body, ChatBody, ImagesBody
from .settings import Settings

R = TypeVar("R", bound=Request | UnderstandRequest)
KINDS = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}
# Fields of `Request` that another field of the body, or the server, decides.
_NOT_HERE = ("image", "latents", "output", "preview_every", "num_images")
# Fields of OpenAI's that ask for nothing else with these values; any other value asks for what this model has not.
_SAME = {"background": ("auto", "opaque"), "quality": ("auto", "standard"), "style": ("auto",)}
_SAME_CHAT: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "top_p": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logprobs": (False,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "store": (True, False),
    "response_format": ({"type": "text"},),
    "stop": ([],),
    "logit_bias": ({},),
    "service_tier": ("auto", "default"),
}


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """How a request's answer is to be sent."""

    stream: bool = False
    deadline: float
    kind: str = "png"
    quality: int = 95
    as_url: bool = False
    """Images as data URIs, not as base64 text alone."""
    partial_images: int = 0
    usage: bool = False
    """A chat's stream ends with the counts of tokens."""


def checked(check: Check, value: Any, name: str, default: Any) -> Any:
    """A field that is not one of `Request`; None is its default. Raises ApiError."""
    if value is None:
        return default
    try:
        return check(value)
    except ValueError as reason:
        raise bad(f"{name} = {shown(value)}: expected {reason}", name) from None


def wanted(body: Body, settings: Settings) -> Wanted:
    """The form of the answer. Raises ApiError."""
    deadline = checked(Number(0, settings.deadline, above=True), body.deadline, "deadline", settings.deadline)
    stream = checked(Flag(), body.stream, "stream", False)
    if not isinstance(body, (ImagesBody, ChatBody)):
        return Wanted(stream=stream, deadline=deadline)
    kind = checked(OneOf(tuple(KINDS)), body.output_format, "output_format", "png")
    quality = checked(Whole(0, 100), body.output_compression, "output_compression", 95)
    if isinstance(body, ChatBody):
        options = body.stream_options or {}
        usage = isinstance(options, dict) and options.get("include_usage") is True
        return Wanted(stream=stream, deadline=deadline, kind=kind, quality=quality, as_url=True, usage=usage)
    form = checked(OneOf(("b64_json", "url")), body.response_format, "response_format", "b64_json")
    partial = checked(Whole(0, 3), body.partial_images, "partial_images", 0)
    return Wanted(
        stream=stream, deadline=deadline, kind=kind, quality=quality, as_url=form == "url", partial_images=partial
    )


def painting(
    body: ImagesBody,
    form: Wanted,
    settings: Settings,
    defaults: Mapping[str, Any],
    picture: Picture | None = None,
    own: RecommendedConfig = PUBLISHED,
) -> Request:
    """The request of /v1/images/…. Raises ApiError and BadRequestError."""
    _nothing_else(body.model_dump(include=set(_SAME)), _SAME)
    named = ("seed", "negative_prompt", "num_inference_steps", "guidance_scale", "think", "cascade")
    options = {**body.extra(), **_given({name: getattr(body, name) for name in named})}
    _no_reserved(options)
    options |= _given({"num_images": body.n})
    previews = form.partial_images if form.stream else 0
    return _paint(body.prompt, options, body.size, settings, defaults, picture, own, previews)


def chat_painting(
    body: ChatBody,
    prompt: str,
    settings: Settings,
    defaults: Mapping[str, Any],
    picture: Picture | None,
    own: RecommendedConfig = PUBLISHED,
) -> Request:
    """A chat that is to paint. Raises ApiError and BadRequestError."""
    return _paint(prompt, _chat_options(body), body.size, settings, defaults, picture, own)


def chat_question(
    body: ChatBody, prompt: str, settings: Settings, defaults: Mapping[str, Any], picture: Picture | None
) -> UnderstandRequest:
    """A chat that is to answer in words. Raises ApiError and BadRequestError."""
    if body.size is not None:
        raise bad("size: this request paints nothing; ask for modalities ['text', 'image']", "size")
    kept = {k: v for k, v in defaults.items() if k in ("max_new_tokens", "temperature", "max_image_tokens")}
    image = None if picture is None else picture.data
    request = as_request(UnderstandRequest, prompt, {**kept, **_chat_options(body), "image": image})
    return within(request, settings)


def _chat_options(body: ChatBody) -> dict[str, Any]:
    extra = body.extra()
    _nothing_else({"n": body.n, **{k: extra.pop(k) for k in tuple(extra) if k in _SAME_CHAT}}, _SAME_CHAT)
    _no_reserved(extra)
    most = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    return extra | _given({"seed": body.seed, "temperature": body.temperature, "max_new_tokens": most})


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in options.items() if v is not None}


def _nothing_else(given: Mapping[str, Any], same: Mapping[str, tuple[Any, ...]]) -> None:
    for name, value in given.items():
        if value is not None and value not in same[name]:
            raise bad(
                f"{name} = {shown(value)}: this model has no such option; leave it out",
                name,
                code="unsupported_parameter",
            )


def _paint(
    prompt: Any,
    given: Mapping[str, Any],
    size: Any,
    settings: Settings,
    defaults: Mapping[str, Any],
    picture: Picture | None,
    own: RecommendedConfig,
    previews: int = 0,
) -> Request:
    unset = {name: getattr(own, name) for name in ("width", "height", "num_inference_steps", "guidance_scale")}
    options = {**unset, **defaults, **given}
    if size not in (None, "auto"):
        try:
            options["width"], options["height"] = parse_size(str(size))
        except BadRequestError as error:
            raise bad(str(error), "size") from None
    elif picture is not None:
        options["width"], options["height"] = edit_size(*picture.size, own)
    if picture is not None:
        options["image"] = picture.data
    request = within(as_request(Request, prompt, options), settings)
    if previews:
        request = replace(request, preview_every=math.ceil((request.num_inference_steps or 1) / (previews + 1)))
    return request


def _no_reserved(options: Mapping[str, Any]) -> None:
    for name in options:
        if name in _NOT_HERE:
            raise bad(f"there is no option {shown(name)} here", name, code="unknown_parameter")


def within(request: R, settings: Settings) -> R:
    """The request, if this server allows as much. Raises ApiError."""
    limits = [
        ("prompt", len(request.prompt), settings.max_prompt, "characters"),
        ("max_new_tokens", request.max_new_tokens, settings.max_new_tokens, "tokens"),
    ]
    if isinstance(request, Request):
        limits += [
            ("negative_prompt", len(request.negative_prompt), settings.max_prompt, "characters"),
            ("n", request.num_images, settings.max_images, "images"),
            ("num_inference_steps", request.num_inference_steps or 1, settings.max_steps, "steps"),
            ("size", (request.width or 16) * (request.height or 16), settings.max_pixels, "pixels"),
        ]
    for name, value, most, unit in limits:
        if value > most:
            raise bad(f"{name}: {value} {unit}; this server takes at most {most}", name, code="limit_exceeded")
    return request


def form_value(name: str, text: str) -> Any:
    """A text field of a form as JSON has it: numbers and booleans, where the field is no text."""
    if name in ("prompt", "negative_prompt", "model", "size", "user") or not text:
        return text
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text) if len(text) < 40 else text
        except ValueError:
            continue
    return text
