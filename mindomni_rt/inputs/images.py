"""Images in and out: Qwen2-VL's resize and patches, pixels for the VAE, PNG with its settings inside.

Pillow and numpy only.
"""

from __future__ import annotations

import io
import json
import logging
import math
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, PngImagePlugin

from ..checkpoint.config import ModelConfig
from ..errors import BadRequestError

logger = logging.getLogger(__name__)
Floats = NDArray[np.float32]

# A 1024x1024 photograph. Beyond it prefill grows faster than what the model can still use; the released code's own
# limit is 16,384 tokens, which a 12-megapixel photo reaches.
DEFAULT_IMAGE_TOKENS = 1369
# The chat utility's limits, applied before those of preprocessor_config.json.
_UTILITY_MIN, _UTILITY_MAX, _MAX_RATIO = 4 * 28 * 28, 16384 * 28 * 28, 200
# What Pillow's decoders raise on damaged files (found by flipping bytes in fourteen formats), not only OSError.
_UNREADABLE = (
    OSError, SyntaxError, ValueError, NotImplementedError, EOFError, LookupError, OverflowError, struct.error,
    zlib.error, Image.DecompressionBombError,
)  # fmt: skip


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


def load_image(source: Any) -> Image.Image:
    """An RGB image from a path, bytes, a PIL image or an array (H, W, 3) of uint8; EXIF orientation applied.

    Raises BadRequestError for what cannot be read as an image.
    """
    try:
        if isinstance(source, Image.Image):
            image = source
        elif isinstance(source, np.ndarray):
            if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3:
                raise BadRequestError(f"image array {source.dtype} {source.shape}: expected uint8 (H, W, 3)")
            image = Image.fromarray(source)
        elif isinstance(source, (bytes, bytearray)):
            image = Image.open(io.BytesIO(source))
        elif isinstance(source, (str, Path)):
            image = Image.open(source)
        else:
            raise BadRequestError(f"image of type {type(source).__name__}: expected a path, bytes, PIL image or array")
        image.load()
        image = ImageOps.exif_transpose(image).convert("RGB")
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise BadRequestError(f"image {source}: {error.strerror}") from error
    except _UNREADABLE as error:
        if isinstance(error, BadRequestError):
            raise
        name = source if isinstance(source, (str, Path)) else "input"
        raise BadRequestError(f"image {name} cannot be read: {error}") from error
    if min(image.size) < 1:
        raise BadRequestError(f"image of {image.width}x{image.height} pixels is empty")
    return image


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
    image = load_image(source)
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


def vae_pixels(source: Any, max_side: int = 1024) -> Floats:
    """A reference image for the VAE: (1, 3, H, W) in [-1, 1], sides cut down to multiples of 16, at most max_side."""
    image = load_image(source)
    shrink = min(1.0, max_side / max(image.size))
    width, height = (max(16, int(side * shrink) // 16 * 16) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC) if (width, height) != image.size else image
    return (np.asarray(image, np.float32) / 127.5 - 1).transpose(2, 0, 1)[None]


def to_pil(pixels: Floats) -> list[Image.Image]:
    """(n, H, W, 3) in [0, 1] -> PIL images, truncating 255·x as the released code does."""
    return [Image.fromarray(row) for row in pixels_to_uint8(pixels)]


def pixels_to_uint8(pixels: Floats) -> NDArray[np.uint8]:
    """Clamps to [0, 1] and truncates 255·x; shape kept. Values that are no numbers become 0, and are logged."""
    missing = int(np.isnan(pixels).sum())
    if missing:
        logger.warning("%d of %d pixel values are NaN, shown black: try float32 for the VAE", missing, pixels.size)
        pixels = np.nan_to_num(pixels, nan=0.0)
    return (np.clip(pixels, 0, 1) * 255).astype(np.uint8)


def save_png(image: Image.Image, path: str | Path, settings: Mapping[str, Any]) -> None:
    """Writes a PNG whose text chunks hold the prompt and all settings (JSON, key "mindomni").

    The file appears whole or not at all. Raises BadRequestError if it cannot be written.
    """
    info = PngImagePlugin.PngInfo()
    if "prompt" in settings:
        # A shell's prompt may hold lone surrogates (bytes that are no UTF-8): JSON escapes them, this chunk cannot.
        info.add_itxt("prompt", str(settings["prompt"]).encode("utf-8", "replace").decode("utf-8"))
    info.add_itxt("mindomni", json.dumps(dict(settings), default=_plain))
    target = Path(path)
    temporary = target.with_name(f".{target.name}.partial")
    try:
        image.save(temporary, "PNG", pnginfo=info)
        temporary.replace(target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise BadRequestError(f"cannot write {target}: {error.strerror or error}") from error


def _plain(value: Any) -> Any:
    """numpy's scalars and arrays as JSON can hold them; anything else by its text."""
    return value.tolist() if isinstance(value, (np.generic, np.ndarray)) else str(value)


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings that `save_png` stored. Raises BadRequestError if there are none."""
    text = getattr(load_png(path), "text", {}).get("mindomni")
    if text is None:
        raise BadRequestError(f"{path} carries no settings of this program")
    try:
        settings = json.loads(text)
    except ValueError as error:
        raise BadRequestError(f"{path}: its settings are not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise BadRequestError(f"{path}: its settings are a JSON {type(settings).__name__}, expected an object")
    return settings


def load_png(path: str | Path) -> Image.Image:
    """An image as stored, with its metadata."""
    try:
        image = Image.open(path)
        image.load()
    except _UNREADABLE as error:
        raise BadRequestError(f"image {path} cannot be read: {error}") from error
    return image
