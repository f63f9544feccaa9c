"""Pictures that clients send: taken under limits, looked at once at the door, and kept as the bytes that came."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import io
from dataclasses import dataclass

from PIL import Image

from mindomni_rt.inputs.opening import FORMATS, open_image

from .errors import bad
from .fetch import fetch
from .settings import Settings

_AT_ONCE = 2  # a picture of 33 million pixels takes 0.1 to 0.4 GB while it is decoded


@dataclass(frozen=True)
class Picture:
    """A picture's file, which is small beside its pixels, and its size (width, height) as a viewer shows it."""

    data: bytes
    size: tuple[int, int]


class Pictures:
    """The door for pictures of one server. Raises ApiError and BadRequestError."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._decoders = asyncio.Semaphore(_AT_ONCE)

    async def at(self, address: object) -> Picture:
        """A data URI, or an address on a host that is allowed."""
        if not isinstance(address, str) or not address:
            raise bad("image_url.url: expected a data URI", "image_url")
        if address.startswith("data:"):
            return await self.of(self._data(address))
        return await self.of(await asyncio.to_thread(fetch, address, self._settings))

    async def of(self, data: bytes) -> Picture:
        """A file's content."""
        if len(data) > self._settings.max_image_bytes:
            raise bad(
                f"the picture has {len(data)} bytes; this server takes at most {self._settings.max_image_bytes}",
                "image",
                code="limit_exceeded",
                status=413,
            )
        async with self._decoders:
            return Picture(data, await asyncio.to_thread(self._size, data))

    def _data(self, uri: str) -> bytes:
        head, comma, text = uri.partition(",")
        if not comma or not head.endswith(";base64") or len(head) > 100:
            raise bad("image_url.url: expected a data URI of the form data:image/png;base64,…", "image_url")
        if len(text) > self._settings.max_image_bytes * 4 // 3 + 4:
            raise bad(
                f"the picture has more than the {self._settings.max_image_bytes} bytes that this server takes",
                "image_url",
                code="limit_exceeded",
                status=413,
            )
        try:
            return base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            raise bad("image_url.url: its data is not base64", "image_url") from None

    def _size(self, data: bytes) -> tuple[int, int]:
        width = height = 0
        # Only the header is read; whatever is wrong with it, `open_image` says so next.
        with contextlib.suppress(Exception), Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
        if width * height > self._settings.max_image_pixels:
            raise bad(
                f"the picture has {width}x{height} pixels; this server takes at most {self._settings.max_image_pixels}",
                "image",
                code="limit_exceeded",
                status=413,
            )
        return open_image(data).size
