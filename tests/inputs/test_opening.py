"""Pictures from anywhere: the colours that a viewer shows, computed by hand, and what is refused before it is read."""

from __future__ import annotations

import ast
import base64
import io
import logging
import os
import struct
import subprocess
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from mindomni_rt.checkpoint.config import published
from mindomni_rt.errors import BadRequestError
from mindomni_rt.inputs import opening
from mindomni_rt.inputs.images import open_image, prepare_image, vae_pixels

WHITE = (255, 255, 255)


def stored(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(
    width: int, height: int, depth: int, colour: int, rows: bytes, *chunks: tuple[bytes, bytes], packed: bool = False
) -> bytes:
    """A PNG written by hand; rows hold a filter byte each."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    middle = b"".join(chunk(*c) for c in chunks)
    return (
        b"\x89PNG\r\n\x1a\n"
        + head
        + middle
        + chunk(b"IDAT", rows if packed else zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def pixels(source: Any) -> list[tuple[int, ...]]:
    return [tuple(pixel) for pixel in np.asarray(open_image(source)).reshape(-1, 3).tolist()]


def icon(mode: str = "RGBA") -> Image.Image:
    """A red square; around it green that is fully transparent."""
    image = Image.new("RGBA", (24, 24), (0, 255, 0, 0))
    image.paste((255, 0, 0, 255), (8, 8, 16, 16))
    return image.convert(mode)


def palette() -> Image.Image:
    image = Image.new("P", (24, 24), 0)
    image.putpalette([0, 255, 0, 255, 0, 0] + [0] * 762)
    image.paste(1, (8, 8, 16, 16))
    return image


TRANSPARENT = {
    "RGBA in memory": icon(),
    "premultiplied": icon().convert("RGBa"),
    "RGBA PNG": stored(icon(), "PNG"),
    "RGBA WebP": stored(icon(), "WEBP", lossless=True, exact=True),
    "RGBA TIFF": stored(icon(), "TIFF"),
    "palette PNG": stored(palette(), "PNG", transparency=0),
    "palette PNG of bytes": stored(palette(), "PNG", transparency=bytes([0, 255])),
    "GIF": stored(palette(), "GIF", transparency=0),
    "RGB PNG": stored(icon("RGB"), "PNG", transparency=(0, 255, 0)),
    "array": np.asarray(icon()),
}


@pytest.mark.parametrize("name", TRANSPARENT)
def test_transparency_is_white(name: str) -> None:
    image = open_image(TRANSPARENT[name])
    assert (image.mode, image.getpixel((0, 0)), image.getpixel((12, 12))) == ("RGB", WHITE, (255, 0, 0))
    assert vae_pixels(TRANSPARENT[name])[0, :, 0, 0].tolist() == [1, 1, 1]
    patches = prepare_image(TRANSPARENT[name], published())
    assert patches.patches.max() > prepare_image(icon("RGB"), published()).patches.max() - 1e-6


def test_grey_with_transparency() -> None:
    grey = Image.new("LA", (4, 4), (0, 0))
    assert open_image(grey).getpixel((0, 0)) == WHITE
    assert open_image(stored(grey, "PNG")).getpixel((0, 0)) == WHITE
    assert open_image(stored(Image.new("L", (4, 4), 7), "PNG", transparency=7)).getpixel((0, 0)) == WHITE
    assert open_image(stored(Image.new("L", (4, 4), 8), "PNG", transparency=7)).getpixel((0, 0)) == (8, 8, 8)


def test_transparent_grey_of_few_bits_and_of_many() -> None:
    four = png(2, 1, 4, 0, b"\0\x5a", (b"tRNS", b"\0\x05"))  # values 5 (transparent) and 10
    assert pixels(four) == [WHITE, (170, 170, 170)]
    sixteen = png(2, 1, 16, 0, b"\0" + struct.pack(">HH", 5000, 5001), (b"tRNS", struct.pack(">H", 5000)))
    assert pixels(sixteen) == [WHITE, (19, 19, 19)]
    colour = png(
        2, 1, 16, 2, b"\0" + struct.pack(">6H", 0, 65535, 0, 65535, 0, 0), (b"tRNS", struct.pack(">3H", 0, 65535, 0))
    )
    assert pixels(colour) == [WHITE, (255, 0, 0)]


def test_half_transparency_is_half_white() -> None:
    assert open_image(Image.new("RGBA", (1, 1), (0, 0, 0, 128))).getpixel((0, 0)) == (127, 127, 127)


@settings(max_examples=100, deadline=None)
@given(st.tuples(*[st.integers(0, 255)] * 4))
def test_composition_is_the_formula(colour: tuple[int, int, int, int]) -> None:
    alpha = colour[3] / 255
    found = open_image(Image.new("RGBA", (1, 1), colour)).getpixel((0, 0))
    assert all(abs(f - (c * alpha + 255 * (1 - alpha))) <= 1 for f, c in zip(found, colour, strict=False))


VALUES = np.array([[0, 32768, 65535]])


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.fromarray(VALUES.astype(np.uint16)), [0, 128, 255]),
        (stored(Image.fromarray(VALUES.astype(np.uint16)), "PNG"), [0, 128, 255]),
        (stored(Image.fromarray(VALUES.astype(np.uint16)), "TIFF"), [0, 128, 255]),
        (Image.fromarray(VALUES.astype(np.int32)), [0, 128, 255]),
        (stored(Image.fromarray(VALUES.astype(np.int32)), "TIFF"), [0, 128, 255]),
        (Image.fromarray(np.array([[0, 128, 255]], np.int32)), [0, 128, 255]),
        (Image.fromarray(np.array([[0, 0.5, 1]], np.float32)), [0, 128, 255]),
        (stored(Image.fromarray(np.array([[0, 0.5, 1]], np.float32)), "TIFF"), [0, 128, 255]),
        (Image.fromarray(np.array([[0, 128, 255]], np.float32)), [0, 128, 255]),
        (Image.fromarray(np.array([[0, 128, 255]], np.uint8)).convert("CMYK"), [0, 128, 255]),
        (stored(Image.fromarray(np.array([[[0] * 3, [255] * 3]], np.uint8)).convert("CMYK"), "TIFF"), [0, 255]),
        (Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1"), [0, 255]),
        (stored(Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1"), "PNG"), [0, 255]),
        (np.array([[0, 128, 255]], np.uint8), [0, 128, 255]),
    ],
)
def test_shades_of_every_mode(image: Any, expected: list[int]) -> None:
    assert [pixel[0] for pixel in pixels(image)] == expected
    assert all(len(set(pixel)) == 1 for pixel in pixels(image))


@pytest.mark.parametrize("values", [[[np.nan, 1]], [[-1, 1]], [[0, 1e9]], [[np.inf, 0]]])
def test_floats_without_a_meaning_are_refused(values: list[list[float]]) -> None:
    with pytest.raises(BadRequestError, match="expected 0 to 1, 255 or 65535"):
        open_image(Image.fromarray(np.array(values, np.float32)))


def scene() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 40, 3), np.uint8))


@pytest.mark.parametrize("value", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "JPEG"])
def test_orientations(kind: str, value: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    image = scene()
    options = {"lossless": True} if kind == "WEBP" else {}
    found = open_image(stored(image, kind, exif=exif, **options))
    upright = {
        1: image, 2: ImageOps.mirror(image), 3: image.rotate(180), 4: ImageOps.flip(image),
        5: ImageOps.mirror(image.rotate(-90, expand=True)), 6: image.rotate(-90, expand=True),
        7: ImageOps.mirror(image.rotate(90, expand=True)), 8: image.rotate(90, expand=True),
    }[value]  # fmt: skip
    assert found.size == upright.size
    if kind != "JPEG":
        assert np.array_equal(np.asarray(found), np.asarray(upright))
    assert np.array_equal(np.asarray(open_image(found)), np.asarray(found)), "not turned twice"


@pytest.mark.parametrize("data", [b"Exif\0\0", b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"\0" * 40])
def test_metadata_that_does_not_parse_does_not_decide(data: bytes) -> None:
    image = scene()
    file = stored(image, "JPEG", exif=data)
    assert open_image(file).size == (40, 20)
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    assert open_image(stored(image, "JPEG", xmp=xmp)).size == (40, 20), "XMP is not read"


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    file = stored(
        frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
    )
    with caplog.at_level(logging.WARNING):
        assert open_image(file).getpixel((0, 0)) == (255, 0, 0)
    assert "3 frames; the first one is used" in caplog.text


def test_every_way_to_pass_a_picture(tmp_path: Path) -> None:
    data = stored(scene(), "PNG")
    (tmp_path / "a.png").write_bytes(data)
    text = base64.b64encode(data).decode()
    sources = [
        tmp_path / "a.png", str(tmp_path / "a.png"), data, bytearray(data), memoryview(data), io.BytesIO(data), text,
        f"data:image/png;base64,{text}", scene(), np.asarray(scene()), Image.open(tmp_path / "a.png"),
    ]  # fmt: skip
    for source in sources:
        assert np.array_equal(np.asarray(open_image(source)), np.asarray(scene())), type(source)
    with (tmp_path / "a.png").open("rb") as file:
        assert open_image(file).size == (40, 20)


def test_the_callers_image_stays_as_it_was() -> None:
    image = icon()
    before = (image.mode, image.tobytes(), dict(image.info))
    open_image(image)
    plain = scene()
    assert open_image(plain) is plain or open_image(plain).tobytes() == plain.tobytes()
    assert (image.mode, image.tobytes(), dict(image.info)) == before


def eps() -> bytes:
    return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"


def test_postscript_starts_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a program was started")

    (tmp_path / "a.png").write_bytes(eps())
    lazy = Image.open(tmp_path / "a.png")
    assert lazy.format == "EPS"
    monkeypatch.setattr(subprocess, "Popen", started)
    for source in (eps(), tmp_path / "a.png", lazy):
        with pytest.raises(BadRequestError, match="expected one of PNG, JPEG"):
            open_image(source)


def test_every_picture_is_opened_by_named_formats() -> None:
    """Wherever the project opens one: Pillow would try forty formats, and EPS among them."""
    root, found = Path(__file__).parents[2], 0
    for folder in ("mindomni_rt", "export", "training", "benchmarks", "serving", "comfyui", "examples"):
        for path in (p for p in (root / folder).rglob("*.py") if not p.is_symlink()):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.Call) or getattr(node.func, "attr", "") != "open":
                    continue
                if ast.unparse(node.func) in ("Image.open", "PIL.Image.open"):
                    found += 1
                    assert "formats" in [keyword.arg for keyword in node.keywords], f"{path}:{node.lineno}"
    assert found >= 6


@pytest.mark.parametrize("kind", ["PCX", "TGA", "ICO", "PDF", "SGI", "PSD"])
def test_formats_that_are_not_named(kind: str) -> None:
    data = b"8BPS\0\x01" + b"\0" * 40 if kind == "PSD" else stored(scene(), kind)
    with pytest.raises(BadRequestError, match="expected one of PNG, JPEG"):
        open_image(data)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/dev/zero", "regular file"),
        ("/dev", "is a folder"),
        ("x" * 300, "no file|too long"),
        ("x" * 300 + ".png", "no file|too long"),
        ("/" + "x" * 300 + ".png", "too long"),
        ("a\0b.png", "null"),
        ("nothing.png", "No such file"),
        ("http://example.com/a.png", "is an address"),
        ("data:image/png,abc", "data URI of the form"),
        ("data:image/png;base64,!!!", "base64"),
        ("data:text/html;base64,PGh0bWw+", "no picture"),
        (io.StringIO("text"), "binary mode"),
        (object(), "expected a path, bytes"),
        (np.zeros((4, 4, 2), np.uint8), "expected uint8"),
        (np.zeros((0, 4, 3), np.uint8), "empty"),
        (True, "expected a path, bytes"),
    ],
)
def test_what_is_no_picture_is_named(source: Any, message: str) -> None:
    with pytest.raises(BadRequestError, match=message):
        open_image(source)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_refused_before_it_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(BadRequestError, match="regular file"):
        open_image(tmp_path / "pipe.png")


def zeros(width: int, height: int) -> bytes:
    """A PNG of one colour, compressed to almost nothing."""
    packer = zlib.compressobj(1)
    row = b"\0" + bytes(width * 3)
    rows = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    return png(width, height, 8, 2, rows, packed=True)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_large_picture_is_refused_by_its_declared_size() -> None:
    data = zeros(13300, 13300)  # 177 megapixels, below Pillow's own limit
    began = time.process_time()
    with pytest.raises(BadRequestError, match="13300x13300 pixels; expected at most 67108864"):
        open_image(data)
    assert time.process_time() - began < 1


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_large_photo_is_decoded_in_reduced_size(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(opening, "MAX_PIXELS", 100 * 100)
    ramp = Image.linear_gradient("L").resize((400, 300)).convert("RGB")
    found = open_image(stored(ramp, "JPEG", quality=95))
    assert found.size in ((100, 75), (50, 38)) and "400x300" in caplog.text
    expected = np.asarray(ramp.resize(found.size, Image.Resampling.BOX), int)
    assert np.abs(np.asarray(found, int) - expected).max() <= 4
    with pytest.raises(BadRequestError, match="400x300 pixels; expected at most"):
        open_image(stored(ramp, "JPEG", progressive=True))


@pytest.mark.parametrize("cut", [0.3, 0.6, 0.9])
def test_a_broken_avif_is_a_named_error(cut: float) -> None:
    data = stored(scene().resize((200, 100)), "AVIF")
    with pytest.raises(BadRequestError, match="image of type bytes"):
        open_image(data[: int(len(data) * cut)])


def test_vae_pixels_can_be_bounded(caplog: pytest.LogCaptureFixture) -> None:
    image = Image.new("RGB", (512, 512))
    assert vae_pixels(image).shape == (1, 3, 512, 512) and not caplog.text
    found = vae_pixels(image, max_tokens=500)
    assert found.shape[2] * found.shape[3] // 256 <= 500 and found.shape[2] >= 320
    assert "1024 tokens do not fit" in caplog.text
    assert vae_pixels(Image.new("RGB", (2000, 20)), max_tokens=3).shape[3] <= 48
