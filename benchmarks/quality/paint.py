"""An item's pictures and words: think once, paint each sample from its own seed."""

from __future__ import annotations

import io
from collections.abc import Generator, Sequence
from typing import Any

from PIL import Image

from mindomni_rt.checks import UNSET
from mindomni_rt.inputs.images import to_pil
from mindomni_rt.inputs.prompts import split_thought
from mindomni_rt.outputs import json_text
from mindomni_rt.pipeline import Pipeline
from mindomni_rt.request import Request
from mindomni_rt.sampling.random import batch_noise

from .run import item_file, seed_of
from .suite import Item, Settings, Suite, Writer


def request_of(item: Item, settings: Settings) -> Request:
    """The request behind an item's images. Raises BadRequestError."""
    return Request(
        prompt=item.prompt,
        think=bool(settings.think if item.think is None else item.think),
        height=settings.size,
        width=settings.size,
        num_inference_steps=settings.steps,
        guidance_scale=UNSET if settings.guidance is None else settings.guidance,
        max_new_tokens=settings.max_new_tokens,
    )


def make(pipe: Pipeline, suite: Suite, item: Item, settings: Settings) -> dict[str, bytes]:
    """An item's files. Thinks once (greedy text is the same for all), then paints one sample after another.

    Each image is what `pipe.generate` makes of the same prompt and the seed in the record.
    """
    request = pipe.complete(request_of(item, settings))
    thought = _last(pipe.think(request))
    guided = pipe.connect(thought, request)
    unguided = pipe.connect_negative(request) if request.guidance_scale != 1 else None
    seeds = [seed_of(settings.seed, item.key or item.name, i) for i in range(settings.samples)]
    images: list[Image.Image] = []
    for seed in seeds:
        latents = batch_noise(seed, 1, request.latent_shape[1:])
        images += to_pil(pipe.decode(_last(pipe.paint(request, latents, guided, unguided))))
    thinking, answer = split_thought(thought.text) if request.think else ("", request.prompt)
    record = {
        "id": item.name,
        "prompt": item.prompt,
        "think": request.think,
        "thinking": thinking,
        "answer": answer,
        "text": thought.text,
        "tokens": len(thought.token_ids),
        "seeds": seeds,
    }
    files = {name: write(images) for name, write in suite.files(item, settings).items()}
    return {**files, item_file(item.name): json_text(record).encode()}


def _last(events: Generator[Any, None, Any]) -> Any:
    """The return value of a stage's generator, its events discarded."""
    while True:
        try:
            next(events)
        except StopIteration as end:
            return end.value


def png(image: Image.Image) -> bytes:
    """A picture as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def grid(images: Sequence[Image.Image]) -> bytes:
    """Pictures of one size in two columns, row by row, as PNG. A single one stays as it is; an empty place is black."""
    if len(images) == 1:
        return png(images[0])
    width, height = images[0].size
    whole = Image.new("RGB", (2 * width, (len(images) + 1) // 2 * height))
    for index, image in enumerate(images):
        whole.paste(image, (index % 2 * width, index // 2 * height))
    return png(whole)


def one_grid(item: Item, settings: Settings) -> dict[str, Writer]:
    """For evaluators that read one picture of an item."""
    return {item.picture: grid}
