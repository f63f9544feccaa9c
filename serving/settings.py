"""Limits and manners of a server: every field with its default and its meaning, checked before the model is read."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Annotated, Any, get_type_hints

from mindomni_rt.checks import Many, Number, Text, Whole, check_fields
from mindomni_rt.errors import BadRequestError
from mindomni_rt.request import MAX_SIDE, MAX_STEPS, MAX_TEXT

MIB = 2**20
KEY = "MINDOMNI_API_KEY"  # the environment variable that holds the key
Names = Annotated[tuple[str, ...], Many(Text(), 100)]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Of one server. Raises BadRequestError naming the field that cannot be."""

    api_key: str | None = field(default=None, repr=False)
    """What a client must send as its bearer token; None asks for nothing."""
    names: Names = ()
    """Names under which the model is served, the first as its own."""
    hosts: Names = ()
    """Host names under which a server without a key may be called; empty is any. Against DNS rebinding."""
    origins: Names = ()
    """Web pages (scheme://host[:port]) that may call this server from a browser, beside its own."""
    fetch_hosts: Names = ()
    """Host names (host or host:port) from which pictures may be downloaded; empty is none."""
    page: str | None = None
    """Path of the page in the browser, which asks for the key in its own way; None has none."""
    max_queue: Annotated[int, Whole(1, 100_000)] = 64
    """Requests that wait at most; one more is refused with 429."""
    max_batch: Annotated[int, Whole(1, 256)] = 8
    """Images of equal requests painted at once; 1 paints each request by itself."""
    deadline: Annotated[float, Number(0.001, 86_400)] = 600.0
    """Seconds from a request's arrival to its last byte; a request may ask for less."""
    grace: Annotated[float, Number(0, 86_400)] = 30.0
    """Seconds that accepted requests have to finish in when the server is stopped."""
    max_body: Annotated[int, Whole(1024, 2**32)] = 32 * MIB
    """Bytes of a request's body."""
    max_body_total: Annotated[int, Whole(1024, 2**40)] = 512 * MIB
    """Bytes of the bodies of all open requests together."""
    max_image_bytes: Annotated[int, Whole(64, 2**28)] = 20 * MIB
    """Bytes of a picture sent in, as a file."""
    max_image_pixels: Annotated[int, Whole(1, 2**26)] = 2**25
    """Pixels of a picture sent in, read in its header before it is decoded."""
    max_pixels: Annotated[int, Whole(256, MAX_SIDE**2)] = 2**22
    """Pixels of an image to paint."""
    max_prompt: Annotated[int, Whole(1, MAX_TEXT)] = 32_000
    """Characters of a prompt, and of a negative prompt."""
    max_images: Annotated[int, Whole(1, 256)] = 10
    """Images of one request (n)."""
    max_steps: Annotated[int, Whole(1, MAX_STEPS)] = 200
    """Denoising steps of one request."""
    max_new_tokens: Annotated[int, Whole(1, 2**21)] = 4096
    """Tokens that one request may have written."""
    max_connections: Annotated[int, Whole(1, 100_000)] = 512
    """Open connections; one more is answered with 503."""
    header_seconds: Annotated[float, Number(0.01, 3600)] = 10.0
    """A client that has not sent its request's head by then is disconnected."""
    body_seconds: Annotated[float, Number(0.01, 3600)] = 60.0
    """A client that has not sent its request's body by then gets 408."""
    write_seconds: Annotated[float, Number(0.01, 3600)] = 60.0
    """A client that takes no byte of its answer for so long is disconnected."""
    open_metrics: bool = False
    """Answer /metrics without a key, for a collector that has none."""
    log_prompts: bool = False
    """Write prompts into the log. Off, nothing that a client wrote or was answered is logged."""

    def __post_init__(self) -> None:
        check_fields(self, BadRequestError)
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable() and self.api_key):
            raise BadRequestError("the API key holds nothing, or what a header cannot: use printable ASCII characters")


def options() -> dict[str, tuple[type, Any]]:
    """Number fields as a command line takes them: name → (type, default)."""
    hints = get_type_hints(Settings)
    return {f.name: (hints[f.name], f.default) for f in fields(Settings) if hints[f.name] in (int, float)}
