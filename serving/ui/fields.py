"""Controls of the page ↔ fields of `Request`: both directions, so that a stored picture can fill in the controls."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from mindomni_rt.errors import BadRequestError
from mindomni_rt.files import parse_json
from mindomni_rt.request import Request, as_request

# In the order of the controls; the last control holds all other fields as JSON.
NAMES = (
    "prompt", "seed", "think", "cascade", "width", "height", "num_inference_steps", "guidance_scale", "num_images",
    "negative_prompt", "max_new_tokens", "temperature",
)  # fmt: skip
_WHOLE = ("width", "height", "num_inference_steps", "num_images", "max_new_tokens")
_PREVIEWS = 6
"""Previews of a picture, about: each is as much work as decoding it."""


def to_request(values: Sequence[Any], **more: Any) -> Request:
    """Values of the controls, `NAMES` and the JSON of the others, as a request. Raises BadRequestError."""
    given = dict(zip(NAMES, values, strict=False))
    given["seed"] = parse_seed(given["seed"])
    for name in _WHOLE:  # a browser may send 96.0
        given[name] = int(given[name]) if isinstance(given[name], float) else given[name]
    if given["guidance_scale"] is None:  # an empty control
        del given["guidance_scale"]
    return as_request(Request, given.pop("prompt"), given | _others(values[len(NAMES)]) | more)


def with_previews(request: Request) -> Request:
    """The request with a few previews, spread over its steps."""
    return replace(request, preview_every=math.ceil((request.num_inference_steps or 1) / (_PREVIEWS + 1)))


def parse_seed(text: str | None) -> int | None:
    """A text, because a browser's numbers end at 2⁵³; empty for a new seed. Raises BadRequestError."""
    text = (text or "").strip()
    try:
        return int(text) if text else None
    except ValueError:
        raise BadRequestError(f"seed {text[:40]!r}: expected a whole number, or nothing for a new one") from None


def _others(text: str | None) -> dict[str, Any]:
    try:
        found = parse_json(text) if text and text.strip() else {}
    except ValueError as error:
        raise BadRequestError(f"other fields: not JSON: {error}") from error
    if not isinstance(found, dict):
        raise BadRequestError('other fields: expected a JSON object such as {"solver": "multistep"}')
    if named := [name for name in ("prompt", "image", "latents", "output", *NAMES) if name in found]:
        raise BadRequestError(f"other fields: {', '.join(named)} cannot be set there")
    return found


def from_settings(settings: Mapping[str, Any]) -> list[Any]:
    """Stored settings as values of the controls, the JSON of the others last. Raises BadRequestError."""
    known = {f.name: settings[f.name] for f in fields(Request) if f.name in settings}
    request = as_request(Request, known.pop("prompt", None), known)
    values = request.settings()
    plain = Request(prompt=request.prompt).settings()
    others = {n: v for n, v in values.items() if n not in NAMES and v != plain[n]}
    values["seed"] = "" if request.seed is None else str(request.seed)
    return [*(values.get(name) for name in NAMES), json.dumps(others) if others else ""]
