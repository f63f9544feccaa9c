"""What the clients of a load test ask, and what each must be answered: the same request alone, in this process."""

from __future__ import annotations

import base64
import hashlib
import io
import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from mindomni_rt.events import GenerationResult
from mindomni_rt.inputs.opening import FORMATS
from mindomni_rt.pipeline import Pipeline
from mindomni_rt.request import Request, UnderstandRequest

_IMAGES, _CHAT = "/v1/images/generations", "/v1/chat/completions"
_PROMPTS = (
    "draw (1 + 2) things of the colour of a lemon, shaped like a wheel",
    "draw (3 - 1) things of the colour of blood, shaped like a dice",
    "draw (2 + 2) things of the colour of grass, shaped like a wheel",
    "draw (4 - 3) things of the colour of the sky, shaped like a tent",
)
_SEEDS = 10


@dataclass(frozen=True, kw_only=True)
class Ask:
    """A request as a client sends it, and as the pipeline takes it."""

    name: str
    route: str
    body: dict[str, Any] = field(repr=False)
    request: Request | UnderstandRequest = field(repr=False)

    @property
    def stream(self) -> bool:
        """Whether the answer comes in pieces."""
        return bool(self.body.get("stream"))


def distinct_asks() -> list[Ask]:
    """Every request of the test: images, images in pieces, chats that paint, questions about a picture."""
    asks: list[Ask] = []
    for index, prompt in enumerate(_PROMPTS):
        for seed in range(_SEEDS):
            side = (32, 48)[seed % 2]
            think = seed % 3 == 0
            steps = 1 + seed % 2
            options: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": 1.0, "think": think}
            options["max_new_tokens"] = 8
            request = Request(prompt=prompt, seed=seed, height=side, width=side, **options)
            body = {"prompt": prompt, "seed": seed, "size": f"{side}x{side}", **options}
            asks.append(Ask(name=f"image {index}/{seed}", route=_IMAGES, body=body, request=request))
            pieces = {**body, "stream": True, "partial_images": 1}
            asks.append(Ask(name=f"stream {index}/{seed}", route=_IMAGES, body=pieces, request=request))
        seed = 100 + index
        options = {"num_inference_steps": 2, "guidance_scale": 1.0}
        request = Request(prompt=prompt, seed=seed, height=32, width=32, max_new_tokens=12, **options)
        body = {"messages": _message(prompt), "modalities": ["text", "image"], "seed": seed, "size": "32x32"}
        body |= {"max_tokens": 12, "stream": True, **options}
        asks.append(Ask(name=f"chat {index}", route=_CHAT, body=body, request=request))
        data = _picture(index)
        question = UnderstandRequest(prompt="what is this?", image=data, max_new_tokens=6, seed=0)
        uri = "data:image/png;base64," + base64.b64encode(data).decode("ascii")
        body = {"messages": _message("what is this?", uri), "max_tokens": 6, "seed": 0}
        asks.append(Ask(name=f"question {index}", route=_CHAT, body=body, request=question))
    return asks


def sequence(asks: list[Ask], count: int, seed: int) -> list[Ask]:
    """`count` requests in an order of its own for each seed; equal ones follow each other here and there."""
    chosen = random.Random(seed)
    found: list[Ask] = []
    while len(found) < count:
        found += [chosen.choice(asks)] * chosen.choice((1, 1, 1, 2, 3))
    return found[:count]


def expected(pipe: Pipeline, ask: Ask) -> str:
    """The mark of the right answer."""
    if isinstance(ask.request, Request):
        return mark(pipe.generate(ask.request))
    return mark(pipe.understand(ask.request))


def mark(result: GenerationResult) -> str:
    """Of a result: its text where it answers a question, else its pixels."""
    return of_pixels(result.images[0]) if len(result.images) else "text " + result.text.strip()


def of_pixels(image: Any) -> str:
    """Of an image: equal for equal pixels."""
    return hashlib.sha256(f"{image.size}".encode() + np.asarray(image.convert("RGB")).tobytes()).hexdigest()


def of_base64(text: str) -> str:
    """Of an image's file in base64, or of a data URI."""
    with Image.open(io.BytesIO(base64.b64decode(text.rpartition(",")[2])), formats=FORMATS) as image:
        return of_pixels(image)


def _message(text: str, uri: str | None = None) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [{"type": "text", "text": text}]
    if uri is not None:
        parts.append({"type": "image_url", "image_url": {"url": uri}})
    return [{"role": "user", "content": parts}]


def _picture(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (32, 32, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()
