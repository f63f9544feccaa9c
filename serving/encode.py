"""Results as JSON: images in base64, and counts of tokens."""

from __future__ import annotations

import base64
import logging
from collections.abc import Sequence
from typing import Any

from PIL.Image import Image

from mindomni_rt import __version__
from mindomni_rt.errors import BadRequestError
from mindomni_rt.events import GenerationResult
from mindomni_rt.inputs.saving import encode_image

from .translate import KINDS, Wanted

logger = logging.getLogger(__name__)


def images(result: GenerationResult, wanted: Wanted) -> list[str]:
    """Each image's file, with the settings that made it inside: base64 text, or a data URI."""
    assert isinstance(result.images, list) and result.seed is not None
    common = {**result.settings, "num_images": 1, "text": result.text, "mindomni_rt": __version__}
    return [_text(image, {**common, "seed": result.seed + index}, wanted) for index, image in enumerate(result.images)]


def previews(found: Sequence[Image], wanted: Wanted) -> list[str]:
    """Previews, as base64 text."""
    return [_text(image, {}, wanted) for image in found]


def _text(image: Image, settings: dict[str, Any], wanted: Wanted) -> str:
    kind = KINDS[wanted.kind]
    try:
        data = encode_image(image, kind, settings, wanted.quality)
    except BadRequestError:  # JPEG and WebP hold 65,000 bytes of settings, fewer than a long prompt takes
        logger.info("settings that do not fit into a %s file are left out of it", kind)
        data = encode_image(image, kind, {"seed": settings["seed"]}, wanted.quality)
    text = base64.b64encode(data).decode("ascii")
    return f"data:image/{wanted.kind};base64,{text}" if wanted.as_url else text


def prompt_tokens(result: GenerationResult) -> int:
    """Tokens of the prompts of all rounds; without thinking none are counted."""
    return sum(found.prompt_tokens for found in result.rounds)


def chat_usage(result: GenerationResult) -> dict[str, int]:
    """As /v1/chat/completions has it."""
    asked, written = prompt_tokens(result), len(result.token_ids)
    return {"prompt_tokens": asked, "completion_tokens": written, "total_tokens": asked + written}


def images_usage(result: GenerationResult) -> dict[str, Any]:
    """As /v1/images has it: an image token is a patch of 16x16 pixels of an image painted."""
    asked, written = prompt_tokens(result), len(result.token_ids)
    painted = sum((image.width // 16) * (image.height // 16) for image in result.images)
    return {
        "input_tokens": asked,
        "input_tokens_details": {"text_tokens": asked, "image_tokens": 0},
        "output_tokens": written + painted,
        "output_tokens_details": {"text_tokens": written, "image_tokens": painted},
        "total_tokens": asked + written + painted,
    }
