"""Several prompts in one call: a request for each, and which of them are painted together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from .checks import shown
from .errors import BadRequestError
from .request import CompleteRequest, Request, as_request

MOST_PIXELS = 2**22
"""Painted at once: four images of 1024x1024. More take memory and gain nothing on any device."""
_SHARED = ("width", "height", "num_inference_steps", "guidance_scale", "negative_prompt", "first_step",
           "guidance_interval", "solver", "step_cache", "preview_every")  # fmt: skip


def as_requests(prompts: Any, options: Mapping[str, Any]) -> list[Request]:
    """A request for each prompt. With a seed, text i has the seed + i · num_images. Raises BadRequestError."""
    if isinstance(prompts, (str, bytes)) or not isinstance(prompts, Sequence):
        raise BadRequestError(f"prompts = {shown(prompts)}: expected a list of texts or Requests; `generate` takes one")
    if not prompts:
        raise BadRequestError("there is no prompt; expected at least one")
    if options.get("latents") is not None:
        raise BadRequestError("latents beside several prompts: give each prompt its own in a Request")
    requests = []
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, (str, Request)):
            raise BadRequestError(f"prompt {index} = {shown(prompt)}: expected text or a Request")
        request = as_request(Request, prompt, options)
        if isinstance(prompt, str) and request.seed is not None:
            request = as_request(Request, prompt, {**options, "seed": request.seed + index * request.num_images})
        requests.append(request)
    return requests


def groups(
    requests: Sequence[CompleteRequest],
    together: bool,
    fits: Callable[[Sequence[CompleteRequest]], bool] = lambda _: True,
) -> Iterator[list[tuple[int, CompleteRequest]]]:
    """Requests with their places, in order: neighbours of equal settings together if the backend can and they fit."""
    numbered = list(enumerate(requests))
    if not together:
        yield from ([one] for one in numbered)
        return
    for _, equal in groupby(numbered, lambda one: [getattr(one[1], name) for name in _SHARED]):
        group: list[tuple[int, CompleteRequest]] = []
        for one in equal:
            larger = [request for _, request in [*group, one]]
            if group and (sum(map(_pixels, larger)) > MOST_PIXELS or not fits(larger)):
                yield group
                group = []
            group.append(one)
        yield group


def _pixels(request: CompleteRequest) -> int:
    return request.num_images * request.width * request.height
