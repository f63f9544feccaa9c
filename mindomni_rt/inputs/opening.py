"""A picture from anywhere → an RGB image as a viewer shows it on a white page. docs/images.md has the table.

Nothing is decoded before its kind and its declared size are known.
"""

from __future__ import annotations

import base64
import binascii
import io
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..checks import shown
from ..errors import BadRequestError
from ..files import read_bytes

logger = logging.getLogger(__name__)

# Pillow knows forty formats more; some start other programs (EPS) and few of them are ever met.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")
MAX_PIXELS = 2**26  # 8192x8192: decoded it takes 0.2 to 0.8 GB for a moment
MAX_BYTES = 2**28
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112
_SIGNATURES = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"P5", b"P6")


def open_image(source: Any) -> Image.Image:
    """An RGB image without metadata, upright, transparency on white; of an animation the first frame.

    source: a path, bytes, a file object, a data URI, base64 text, a PIL image, or a uint8 array (H, W), (H, W, 3) or
    (H, W, 4). An image that this function returned is returned as it is. Raises BadRequestError for what is none of
    these, cannot be read, has another format than FORMATS or more than MAX_PIXELS.
    """
    if isinstance(source, Image.Image) and source.mode == "RGB" and not source.info and type(source) is Image.Image:
        return _not_empty(source)
    name = _name(source)
    try:
        image = _opened(source)
        _not_empty(image)
        _check_size(image)
        _tell_frames(image, name)
        _scale_transparent_grey(image)
        image.load()
        turn = _orientation(image)  # after load: a PNG may hold it behind the pixels
        image = _rgb(image)
    except BadRequestError as error:
        raise BadRequestError(f"image {name}: {error}") from None
    except OSError as error:
        raise BadRequestError(f"image {name}: {error.strerror or f'cannot be read: {error}'}") from error
    except Exception as error:  # Pillow's decoders raise SyntaxError, struct.error, RuntimeError, … on damaged files
        raise BadRequestError(f"image {name}: cannot be read: {error}") from error
    image = image.transpose(_TRANSPOSE[turn]) if turn in _TRANSPOSE else image
    image.info.clear()
    return image


def _name(source: Any) -> str:
    if isinstance(source, str) and len(source) > 300:
        return f"{source[:30]}…"
    if isinstance(source, (str, os.PathLike)):
        return str(source).split(",", 1)[0] or "''"
    return f"of type {type(source).__name__}"


def _not_empty(image: Image.Image) -> Image.Image:
    if min(image.size) < 1:
        raise BadRequestError(f"image of {image.width}x{image.height} pixels is empty")
    return image


def _opened(source: Any) -> Image.Image:
    """The source as a Pillow image, its pixels not decoded yet."""
    if isinstance(source, Image.Image):
        kind = getattr(source, "format", None)
        if kind is not None and kind not in (*FORMATS, "MPO", "DIB"):
            raise BadRequestError(f"its format is {kind}; expected one of {', '.join(FORMATS)}")
        return source
    if isinstance(source, np.ndarray):
        if (
            source.dtype != np.uint8
            or source.ndim not in (2, 3)
            or (source.ndim == 3 and source.shape[2] not in (3, 4))
        ):
            raise BadRequestError(f"array {source.dtype} {source.shape}: expected uint8 (H, W), (H, W, 3) or (H, W, 4)")
        if 0 in source.shape:
            raise BadRequestError(f"array of shape {source.shape} is empty")
        return Image.fromarray(np.ascontiguousarray(source))
    try:
        return Image.open(io.BytesIO(_data(source)), formats=FORMATS)
    except UnidentifiedImageError:
        raise BadRequestError(f"cannot be read: expected one of {', '.join(FORMATS)}") from None


def _data(source: Any) -> bytes:
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _limited(bytes(source))
    if isinstance(source, str) and source.startswith("data:"):
        head, comma, text = source.partition(",")
        if not comma or not head.endswith(";base64"):
            raise BadRequestError("expected a data URI of the form data:image/png;base64,…")
        return _base64(text, "its text after the comma")
    if isinstance(source, str) and source.lower().startswith(("http://", "https://")):
        raise BadRequestError("is an address; nothing is downloaded here: pass the bytes or a path")
    if isinstance(source, (str, os.PathLike)):
        if not str(source).strip():
            raise BadRequestError("is an empty text; expected a path, data URI or base64 text")
        if isinstance(source, str) and len(source) > 255 and os.sep not in source[:1]:
            return _base64(source)
        try:
            return read_bytes(Path(source), MAX_BYTES)
        except FileNotFoundError:
            if isinstance(source, str) and len(source) > 40 and "." not in source:
                return _base64(source)
            raise
    if hasattr(source, "read"):
        data = source.read(MAX_BYTES + 1)
        if not isinstance(data, bytes):
            raise BadRequestError("its read() gives no bytes; open the file in binary mode")
        return _limited(data)
    raise BadRequestError("expected a path, bytes, file object, data URI, base64 text, PIL image or uint8 array")


def _limited(data: bytes) -> bytes:
    if len(data) > MAX_BYTES:
        raise BadRequestError(f"has more than {MAX_BYTES} bytes")
    return data


def _base64(text: str, what: str = "is no file, and its text") -> bytes:
    try:
        data = base64.b64decode("".join(text.split()).encode("ascii"), validate=True)
    except (binascii.Error, ValueError):
        raise BadRequestError(f"{what} is no base64") from None
    if not data.startswith(_SIGNATURES) and data[4:8] != b"ftyp":
        raise BadRequestError(f"{what} is base64, but holds no picture")
    return _limited(data)


def _check_size(image: Image.Image) -> None:
    """Refuses a picture by its declared size; a large baseline JPEG is decoded at a half, quarter or eighth instead."""
    if image.width * image.height <= MAX_PIXELS:
        return
    declared = f"{image.width}x{image.height}"
    if getattr(image, "format", None) in ("JPEG", "MPO") and not image.info.get("progressive"):
        scale = (MAX_PIXELS / (image.width * image.height)) ** 0.5 / 2
        image.draft("RGB", (max(1, int(image.width * scale)), max(1, int(image.height * scale))))
    if image.width * image.height > MAX_PIXELS:
        raise BadRequestError(f"cannot be read: {declared} pixels; expected at most {MAX_PIXELS} in all, reduce it")
    logger.warning("image of %s pixels decoded at %dx%d", declared, image.width, image.height)


def _tell_frames(image: Image.Image, name: str) -> None:
    if getattr(image, "format", None) in ("GIF", "WEBP", "PNG", "AVIF", "TIFF") and getattr(image, "n_frames", 1) > 1:
        logger.warning("image %s has %d frames; the first one is used", name, getattr(image, "n_frames", 1))
        image.seek(0)


def _scale_transparent_grey(image: Image.Image) -> None:
    """Pillow scales 2- and 4-bit grey to 8 bits, but not the grey value that the file calls transparent."""
    tile, key = getattr(image, "tile", None), image.info.get("transparency")
    if tile and isinstance(key, int):
        factor = {"L;2": 85, "L;4": 17}.get(tile[0][3] if isinstance(tile[0][3], str) else "", 1)
        image.info["transparency"] = key * factor


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 (upright) where it is absent or does not parse."""
    exif = Image.Exif()
    try:
        data = image.info.get("exif")
        if data is None:
            return 1
        exif.load(data)
        value = exif.get(_ORIENTATION, 1)
    except Exception:  # noqa: BLE001 damaged metadata raises anything, and never decides about pixels
        return 1
    return value if isinstance(value, int) else 1


def _rgb(image: Image.Image) -> Image.Image:
    """Any mode → RGB on white, always a new image."""
    mode = image.mode
    if mode == "I" or mode.startswith("I;16"):
        return _from_numbers(_sixteen_bit(image))
    if mode == "F":
        return _from_numbers(_floats(image))
    image = _with_alpha(image)
    if image.mode == "RGBA":
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB") if image.mode != "RGB" else image.copy()


def _with_alpha(image: Image.Image) -> Image.Image:
    """RGBA where the image has transparency of any kind, else the image."""
    if image.mode in ("RGBA", "LA", "PA"):
        return image.convert("RGBA")
    if image.mode in ("RGBa", "La"):
        return image.convert("RGBA" if image.mode == "RGBa" else "LA").convert("RGBA")
    key = image.info.get("transparency")
    if key is None:
        return image
    if image.mode == "P":
        return image.convert("RGBA")
    # tRNS of a 16-bit RGB file names 16-bit values, while Pillow keeps the high bytes.
    colour = np.array(key).reshape(-1)
    colour = colour >> 8 if colour.size and colour.max() > 255 else colour
    pixels = np.asarray(image.convert("RGB"))
    alpha = np.where((pixels == colour.astype(np.uint8)).all(axis=-1), 0, 255).astype(np.uint8)
    return Image.fromarray(np.dstack([pixels, alpha]))


def _sixteen_bit(image: Image.Image) -> Any:
    """I;16 and I as values in [0, 1]. An image in memory of mode I, none of whose values exceeds 255, holds 8 bits."""
    values = np.asarray(image).astype(np.float64)
    key = image.info.get("transparency")
    if isinstance(key, int):
        values = np.where(values == key, 65535, values)  # transparent: white
    if values.min() < 0 or values.max() > 65535:
        raise BadRequestError(f"holds values {values.min():g} to {values.max():g}; expected 0 to 65535")
    eight = image.mode == "I" and getattr(image, "format", None) is None and values.max() <= 255
    return values / (255 if eight else 65535)


def _floats(image: Image.Image) -> Any:
    """F as values in [0, 1]: 0 to 1 as they are, else 0 to 255 or 0 to 65535."""
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all() or values.min() < 0 or values.max() > 65535:
        raise BadRequestError(
            f"holds values {shown(float(values.min()))} to {shown(float(values.max()))}; expected 0 to 1, 255 or 65535"
        )
    top = values.max()
    return values / (1 if top <= 1 else 255 if top <= 255 else 65535)


def _from_numbers(values: Any) -> Image.Image:
    return Image.fromarray(np.rint(values * 255).astype(np.uint8)).convert("RGB")
