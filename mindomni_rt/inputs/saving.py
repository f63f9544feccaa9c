"""Pictures out: pixels to PIL, and PNG, JPEG or WebP files that carry the settings which made them."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from ..errors import BadRequestError
from ..files import parse_json, read_bytes, replace_file
from .opening import MAX_BYTES, MAX_PIXELS

logger = logging.getLogger(__name__)
KINDS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
_EXIF, _COMMENT = 0x8769, 0x9286
_CODE = b"ASCII\0\0\0"  # how EXIF says what its comment is written in
_MOST_EXIF = 65000  # a JPEG segment ends at 65,535 bytes


def to_pil(pixels: NDArray[np.float32]) -> list[Image.Image]:
    """(n, H, W, 3) in [0, 1] -> PIL images, truncating 255·x as the released code does."""
    return [Image.fromarray(row) for row in pixels_to_uint8(pixels)]


def pixels_to_uint8(pixels: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Clamps to [0, 1] and truncates 255·x; shape kept. NaN becomes 0, and is logged."""
    missing = int(np.isnan(pixels).sum())
    if missing:
        logger.warning("%d of %d pixel values are NaN, shown black: try float32 for the VAE", missing, pixels.size)
        pixels = np.nan_to_num(pixels, nan=0.0)
    return (np.clip(pixels, 0, 1) * 255).astype(np.uint8)


def save_image(image: Image.Image, path: str | Path, settings: Mapping[str, Any]) -> None:
    """Writes a PNG, JPEG or WebP, by the name's ending, with the settings inside: `read_settings` gives them back.

    A PNG has text chunks "prompt" and "mindomni" (JSON); the others have the JSON as EXIF's user comment. The file
    appears whole or not at all. Raises BadRequestError if it cannot be written.
    """
    target = Path(path)
    kind = KINDS.get(target.suffix.lower())
    if kind is None:
        raise BadRequestError(f"{target}: expected a name that ends in {', '.join(KINDS)}")
    options = _options(kind, settings, str(target))
    try:
        replace_file(target, lambda temporary: image.save(temporary, kind, **options))
    except OSError as error:
        raise BadRequestError(f"cannot write {target}: {error.strerror or error}") from error


def encode_image(image: Image.Image, kind: str, settings: Mapping[str, Any], quality: int = 95) -> bytes:
    """The bytes that `save_image` writes. kind: "PNG", "JPEG" or "WEBP"; quality: 0 to 100, of the last two."""
    options = _options(kind, settings, f"{kind} image")
    file = io.BytesIO()
    image.save(file, kind, **(options if kind == "PNG" else {**options, "quality": quality}))
    return file.getvalue()


def _options(kind: str, settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """How Pillow writes a kind of file with these settings inside."""
    text = json.dumps(dict(settings), default=_plain)
    if kind == "PNG":
        info = PngImagePlugin.PngInfo()
        if "prompt" in settings:
            # JSON escapes lone surrogates, this chunk cannot.
            info.add_itxt("prompt", str(settings["prompt"]).encode("utf-8", "replace").decode("utf-8"))
        info.add_itxt("mindomni", text)
        return {"pnginfo": info}
    if len(text) > _MOST_EXIF:
        raise BadRequestError(f"{name}: settings of {len(text)} bytes do not fit; save it as .png")
    exif = Image.Exif()
    exif.get_ifd(_EXIF)[_COMMENT] = _CODE + text.encode("ascii")
    return {"exif": exif, "quality": 95} | ({"subsampling": 0} if kind == "JPEG" else {})


def png_bytes(image: Image.Image) -> bytes:
    """A picture as PNG, without settings."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def numbered(path: Path, count: int) -> list[Path]:
    """The name itself for one image, else NAME-0, NAME-1, …"""
    return [path] if count == 1 else [path.with_name(f"{path.stem}-{i}{path.suffix}") for i in range(count)]


def _plain(value: Any) -> Any:
    """numpy's scalars and arrays as JSON can hold them; anything else by its text."""
    return value.tolist() if isinstance(value, (np.generic, np.ndarray)) else str(value)


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings that `save_image` stored. Raises BadRequestError if there are none."""
    text = _stored(path)
    if text is None:
        raise BadRequestError(f"{path} carries no settings of this program")
    try:
        settings = parse_json(text)
    except ValueError as error:
        raise BadRequestError(f"{path}: its settings are not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise BadRequestError(f"{path}: its settings are a JSON {type(settings).__name__}, expected an object")
    return settings


def _stored(path: str | Path) -> str | None:
    try:
        image = Image.open(io.BytesIO(read_bytes(Path(path), MAX_BYTES)), formats=("PNG", "JPEG", "WEBP"))
        if image.width * image.height > MAX_PIXELS:
            raise BadRequestError(f"image {path}: cannot be read: {image.width}x{image.height} pixels are too many")
        if image.format == "PNG":
            image.load()  # text chunks may follow the pixels
            return getattr(image, "text", {}).get("mindomni")
        comment = image.getexif().get_ifd(_EXIF).get(_COMMENT)
    except BadRequestError:
        raise
    except UnidentifiedImageError:  # its text names the buffer, not the file
        raise BadRequestError(f"image {path} cannot be read: expected PNG, JPEG or WebP") from None
    except Exception as error:  # as in `open_image`: damaged files raise anything
        raise BadRequestError(f"image {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not isinstance(comment, bytes) or not comment.startswith(_CODE):
        return None
    return comment.removeprefix(_CODE).decode("utf-8", "replace")
