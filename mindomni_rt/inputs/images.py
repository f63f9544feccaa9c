"""Reference images as the encoders take them: Qwen2-VL's resize and patches, pixels for the VAE.

Pillow and numpy only.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..checkpoint.config import ModelConfig
from ..errors import BadRequestError
from .opening import open_image
from .saving import pixels_to_uint8, read_settings, save_image, to_pil

__all__ = [
    "DEFAULT_IMAGE_TOKENS",
    "ImagePatches",
    "load_image",
    "open_image",
    "pixels_to_uint8",
    "prepare_image",
    "read_settings",
    "save_image",
    "smart_resize",
    "to_pil",
    "vae_pixels",
]
logger = logging.getLogger(__name__)
Floats = NDArray[np.float32]
load_image = open_image

# A 1024x1024 photograph. Beyond it prefill grows faster than what the model can still use; the released code's own
# limit is 16,384 tokens, which a 12-megapixel photo reaches.
DEFAULT_IMAGE_TOKENS = 1369
# The chat utility's limits, applied before those of preprocessor_config.json.
_UTILITY_MIN, _UTILITY_MAX, _MAX_RATIO = 4 * 28 * 28, 16384 * 28 * 28, 200


@dataclass(frozen=True)
class ImagePatches:
    """An input image as the vision tower takes it: patches (N, patch_dim) float32 in merge order, grid (t, h, w).

    size and original_size are (height, width) in pixels, after the resize and as given (EXIF orientation applied).
    """

    patches: Floats
    grid: tuple[int, int, int]
    capped: bool = False  # the token cap made it smaller than the checkpoint's own limits would
    size: tuple[int, int] = (0, 0)
    original_size: tuple[int, int] = (0, 0)
    merge_size: int = 2

    @property
    def tokens(self) -> int:
        """Image tokens in the prompt: one for each merge_size² patches."""
        return self.patches.shape[0] // self.merge_size**2


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Qwen2-VL's rule: sides to multiples of factor, area within limits, aspect ratio kept. Returns (height, width)."""
    if max(height, width) / min(height, width) > _MAX_RATIO:
        raise BadRequestError(f"image of {width}x{height} pixels: aspect ratio above {_MAX_RATIO}")
    rows, columns = (max(factor, round(side / factor) * factor) for side in (height, width))
    if rows * columns > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows, columns = (max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    elif rows * columns < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, columns = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return rows, columns


def prepare_image(source: Any, config: ModelConfig, max_tokens: int | None = DEFAULT_IMAGE_TOKENS) -> ImagePatches:
    """Resizes twice as the released code does (chat utility, then preprocessor), normalises, cuts into patches.

    max_tokens caps the image's tokens and logs when it bites; None leaves the checkpoint's own limit. A cap that bites
    equals a lower max_pixels in the preprocessor's file; one that does not changes nothing. As there, sides never fall
    below one token, so a strip of aspect ratio r keeps at least sqrt(r * max_tokens) tokens under a very low cap.
    Raises BadRequestError for an unreadable image, an aspect ratio above 200 and a cap below 4.
    """
    image = open_image(source)
    vision, limits = config.vision, config.image
    factor = vision.patch_size * vision.merge_size
    if max_tokens is not None and max_tokens < 4:
        raise BadRequestError(f"max_image_tokens = {max_tokens}: expected at least 4, or None for no cap")
    highest = limits.max_pixels if max_tokens is None else min(limits.max_pixels, max_tokens * factor**2)
    original = (image.height, image.width)
    first = smart_resize(*original, factor, _UTILITY_MIN, _UTILITY_MAX)
    free = smart_resize(*first, factor, limits.min_pixels, limits.max_pixels)
    size = smart_resize(*first, factor, min(limits.min_pixels, highest), highest)
    for height, width in (first, size):
        if (width, height) != image.size:
            image = image.resize((width, height), Image.Resampling.BICUBIC)
    if size != free:
        logger.warning(
            "reference image reduced to %dx%d pixels, %d tokens (cap %s; %d without it)",
            size[1], size[0], size[0] * size[1] // factor**2, max_tokens, free[0] * free[1] // factor**2,
        )  # fmt: skip
    mean: Floats = np.array(limits.image_mean, dtype=np.float32)
    std: Floats = np.array(limits.image_std, dtype=np.float32)
    pixels: Floats = (np.array(image, dtype=np.float32) * np.float32(1 / 255) - mean) / std
    patches, grid = _patches(pixels, vision.patch_size, vision.merge_size, vision.temporal_patch_size)
    return ImagePatches(patches, grid, size != free, size, original, vision.merge_size)


def _patches(pixels: Floats, patch: int, merge: int, times: int) -> tuple[Floats, tuple[int, int, int]]:
    """(H, W, 3) -> (N, 3 * times * patch²) in merge order; a still image is doubled in time."""
    rows, columns = pixels.shape[0] // patch, pixels.shape[1] // patch
    cut = pixels.transpose(2, 0, 1).reshape(3, rows // merge, merge, patch, columns // merge, merge, patch)
    cut = cut.transpose(1, 4, 2, 5, 0, 3, 6)  # row, column, row in group, column in group, channel, y, x
    cut = np.repeat(cut[:, :, :, :, :, None], times, axis=5)
    return np.ascontiguousarray(cut.reshape(rows * columns, -1)), (1, rows, columns)


def vae_pixels(source: Any, max_side: int = 1024, max_tokens: int | None = None) -> Floats:
    """A reference image for the VAE: (1, 3, H, W) in [-1, 1], sides cut down to multiples of 16, at most max_side.

    max_tokens: a picture whose (H / 16) * (W / 16) tokens are more is reduced, and that is logged.
    """
    image = open_image(source)
    shrink = min(1.0, max_side / max(image.size))
    width, height = _sixteens(image, shrink)
    if max_tokens is not None and width * height > max_tokens * 256:
        tokens = width * height // 256
        while width * height > max_tokens * 256 and max(width, height) > 16:
            shrink *= min(0.99, math.sqrt(max_tokens * 256 / (width * height)))
            width, height = _sixteens(image, shrink)
        logger.warning("reference image reduced to %dx%d for the VAE: %d tokens do not fit", width, height, tokens)
    image = image.resize((width, height), Image.Resampling.BICUBIC) if (width, height) != image.size else image
    return (np.asarray(image, np.float32) / 127.5 - 1).transpose(2, 0, 1)[None]


def _sixteens(image: Image.Image, shrink: float) -> tuple[int, int]:
    width, height = (max(16, int(side * shrink) // 16 * 16) for side in image.size)
    return width, height
