"""Odd pictures: files of eight formats with changed bytes, sizes, chunks and metadata, and objects of other kinds."""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from .change import Change, Mutant, Random, flipped
from .sources import PARITY

SIZES = (0, 1, 2**15, 2**16 - 1, 2**24, 2**31 - 1, 2**32 - 1)


@cache
def scene() -> Image.Image:
    return Image.open(PARITY / "cases" / "scene.png").convert("RGB")


@cache
def files() -> dict[str, bytes]:
    """The same scene in many forms. Those in `exact` decode to the same pixels."""
    rgb = scene()
    grey, palette = rgb.convert("L"), rgb.quantize(16)
    sixteen = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    frames: dict[str, Any] = dict(save_all=True, append_images=[rgb.rotate(90)])
    made: dict[str, bytes] = {}

    def add(name: str, image: Image.Image, kind: str, **options: Any) -> None:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        made[name] = buffer.getvalue()

    for name, image, options in (
        ("png", rgb, {}), ("png alpha", rgb.convert("RGBA"), {}), ("png palette", palette, {}), ("png grey", grey, {}),
        ("png 16 bit", sixteen, {}), ("png 1 bit", grey.convert("1"), {}), ("png grey alpha", grey.convert("LA"), {}), ("apng", rgb, frames),
    ):  # fmt: skip
        add(name, image, "PNG", **options)
    add("jpeg", rgb, "JPEG")
    add("jpeg progressive", rgb, "JPEG", progressive=True)
    add("jpeg cmyk", rgb.convert("CMYK"), "JPEG")
    add("webp", rgb, "WEBP", lossless=True)
    add("webp lossy", rgb, "WEBP")
    add("webp frames", rgb, "WEBP", lossless=True, **frames)
    add("gif", palette, "GIF")
    add("gif frames", palette, "GIF", save_all=True, append_images=[palette.rotate(90)])
    add("bmp", rgb, "BMP")
    add("bmp palette", palette, "BMP")
    for compression in ("raw", "tiff_lzw", "tiff_deflate", "packbits", "jpeg"):
        add(f"tiff {compression}", rgb, "TIFF", compression=compression)
    add("tiff float", Image.fromarray(np.asarray(grey).astype(np.float32) / 255), "TIFF")
    add("ppm", rgb, "PPM")
    add("avif", rgb, "AVIF")
    return made


EXACT = ("png", "png alpha", "apng", "webp", "webp frames", "bmp", "tiff raw", "tiff_lzw", "tiff tiff_deflate", "ppm")
Made = tuple[Any, str, str, str]  # the input, a note, why it may differ from the scene, its base


def changed(rng: Random) -> Made:
    name = rng.choice(sorted(files()))
    return flipped(rng, files()[name]), f"{name}: bytes changed", "other bytes", name


def cut(rng: Random) -> Made:
    name = rng.choice(sorted(files()))
    data = files()[name]
    new = rng.choice((data[: rng.randrange(len(data))], data + rng.randbytes(100), b"", data[: len(data) // 2] * 2))
    return new, f"{name}: {len(new)} of {len(data)} bytes", "other bytes", name


def joined_parts(rng: Random) -> Made:
    first, second = rng.sample(sorted(files()), 2)
    a, b = files()[first], files()[second]
    at = rng.randrange(min(len(a), len(b)))
    return a[:at] + b[at:], f"{first} and {second} from byte {at}", "other bytes", first


def size(rng: Random) -> Made:
    """Another declared width or height, with the checksum of PNG fixed."""
    name = rng.choice(("png", "png grey", "jpeg", "jpeg progressive", "gif", "bmp", "webp", "tiff raw", "ppm", "avif"))
    data, value = bytearray(files()[name]), rng.choice(SIZES)
    if name.startswith("png"):
        struct.pack_into(">I", data, rng.choice((16, 20)), min(value, 2**32 - 1))
        struct.pack_into(">I", data, 29, zlib.crc32(data[12:29]))
    elif name.startswith("jpeg"):
        at = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
        struct.pack_into(">H", data, at + rng.choice((5, 7)), min(value, 65535))
    elif name == "gif":
        struct.pack_into("<H", data, rng.choice((6, 8)), min(value, 65535))
    elif name == "bmp":
        struct.pack_into("<i", data, rng.choice((18, 22)), min(value, 2**31 - 1))
    elif name == "ppm":
        head, rest = bytes(data).split(b"\n", 1)
        return head + b"\n%d " % value + rest.split(b" ", 1)[1], f"ppm: width {value}", "another size", name
    else:
        for _ in range(4):
            at = rng.randrange(8, min(len(data) - 4, 200))
            struct.pack_into(rng.choice(("<I", ">I")), data, at, value)
    return bytes(data), f"{name}: a size of {value}", "another size", name


def bomb(rng: Random) -> Made:
    """A PNG of few bytes that declares many pixels or much metadata."""
    side = rng.choice((4000, 8000, 8192, 8193, 13_300, 30_000, 100_000))
    kind = rng.choice((0, 2, 3, 4, 6))
    lines = zlib.compress(b"\0" * rng.choice((10, 10**6, 2 * 10**7)))
    header = struct.pack(">IIBBBBB", side, side, 8, kind, 0, 0, rng.choice((0, 1)))
    more = [
        (b"zTXt", b"a\0\0" + lines),
        (b"iCCP", b"a\0\0" + lines),
        (b"tEXt", b"a\0" + b"x" * 10**6),
        (b"iTXt", b"a\0\1\0\0\0" + lines),
    ]
    chunks = [(b"IHDR", header), *rng.sample(more, rng.randrange(3))]
    chunks += [(b"PLTE", b"\0" * 768)] if kind == 3 else []
    chunks += [(b"IDAT", lines), (b"IEND", b"")]
    return _png(chunks), f"png of {side}x{side} pixels, {len(lines)} bytes", "another picture", "png"


def metadata(rng: Random) -> Made:
    """Damaged metadata that says nothing about pixels: the scene must come out, or an error."""
    junk = rng.choice(
        (
            b"",
            b"x",
            b"Exif\0\0",
            b"Exif\0\0MM\0*" + rng.randbytes(60),
            b"MM\0*\xff\xff\xff\xff",
            rng.randbytes(300),
            b"\0" * 65000,
        )
    )
    which = rng.choice(
        (b"eXIf", b"iCCP", b"tEXt", b"zTXt", b"iTXt", b"pHYs", b"tIME", b"gAMA", b"cHRM", b"sRGB", b"xyZz")
    )
    chunks = _chunks(files()["png"])
    chunks.insert(rng.randrange(1, len(chunks) - 1), (which, junk))
    # Random bytes may hold a whole orientation tag.
    return (
        _png(chunks),
        f"png with {which.decode()} of {len(junk)} bytes",
        "an orientation" if which == b"eXIf" else "",
        "png",
    )


def animation(rng: Random) -> Made:
    name = rng.choice(("apng", "gif frames", "webp frames"))
    return flipped(rng, files()[name], 3), f"{name}: bytes changed", "other bytes", name


def odd_object(rng: Random) -> Made:
    array = np.asarray(scene())
    text = base64.b64encode(files()["png"]).decode()
    pool: tuple[tuple[Callable[[], Any], str], ...] = (
        (lambda: array.astype(np.float32), "no"), (lambda: array.astype(np.int64), "no"), (lambda: array[:0], "no"), (lambda: array[None], "no"),
        (lambda: array[..., :2], "no"), (lambda: array[:, ::-1][:, ::-1], ""), (lambda: np.broadcast_to(np.uint8(3), (10**5, 10**5)), "no"),
        (lambda: array.astype(object), "no"), (lambda: Image.new("F", (56, 56), float("nan")), "no"), (lambda: Image.new("I", (56, 56), -5), "no"),
        (lambda: Image.new("RGB", (0, 5)), "no"), (lambda: Image.new("RGB", (30_000, 1)), "another picture"), (lambda: Image.new("HSV", (56, 56)), "another picture"),
        (lambda: Image.new("LAB", (56, 56)), "another picture"), (lambda: Image.new("YCbCr", (56, 56)), "another picture"), (lambda: "", "no"), (lambda: ".", "no"),
        (lambda: "/dev/zero", "no"), (lambda: json.__file__, "no"), (lambda: "\0", "no"), (lambda: "a" * 10**6, "no"), (lambda: "\ud800", "no"),
        (lambda: "data:image/png;base64," + text, ""), (lambda: text, ""), (lambda: "data:,x", "no"), (lambda: "data:image/png;base64," + text[:40], "no"),
        (lambda: "http://localhost/x.png", "no"), (lambda: "file:///etc/passwd", "no"), (lambda: bytearray(files()["png"]), ""), (lambda: memoryview(files()["png"]), ""),
        (lambda: io.BytesIO(files()["png"]), ""), (lambda: io.StringIO("x"), "no"), (lambda: io.BytesIO(), "no"), (lambda: 5, "no"), (lambda: [1], "no"),
        (lambda: True, "no"), (lambda: {"path": "x"}, "no"), (lambda: object(), "no"), (lambda: str(PARITY / "cases" / "scene.png"), ""), (lambda: PARITY, "no"),
        (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "no"), (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no"),
    )  # fmt: skip
    at = rng.randrange(len(pool))
    make, asked = pool[at]
    return make, f"object {at}", "" if asked == "no" else asked, "refused" if asked == "no" else "png"


def same(rng: Random) -> Made:
    """Forms that hold exactly the scene's pixels."""
    name = rng.choice([name for name in EXACT if name in files()])
    return files()[name], name, "", "png"


MUTATIONS: dict[str, Callable[[Random], Made]] = {
    "picture bytes": changed, "picture cut": cut, "picture parts": joined_parts, "picture size": size, "picture bomb": bomb,
    "picture metadata": metadata, "animation bytes": animation, "picture object": odd_object, "same picture": same,
}  # fmt: skip


def make(rng: Random, kind: str, seed: int, number: int) -> Mutant:
    """One request with an odd picture."""
    data, note, asked, base = MUTATIONS[kind](rng)

    def call(pipe: Any) -> Any:
        return pipe.understand(
            "what is it", data() if callable(data) else data, max_new_tokens=1, seed=1, max_image_tokens=16
        )

    source = "picture refused" if base == "refused" else "picture"
    return Mutant(
        seed=seed,
        number=number,
        target="pictures",
        kind=kind,
        source=source,
        change=Change(files={}, note=note, asked=asked),
        call=call,
    )


def _chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    at, out = 8, []
    while at < len(data):
        length = struct.unpack(">I", data[at : at + 4])[0]
        out.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    return out


def _png(chunks: list[tuple[bytes, bytes]]) -> bytes:
    out = b"\x89PNG\r\n\x1a\n"
    for kind, data in chunks:
        out += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return out
