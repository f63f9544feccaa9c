"""Image preparation against transformers' own processor, and bad images."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import random
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import PARITY, load_case
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from mindomni_rt.checkpoint.config import ImageConfig, published
from mindomni_rt.errors import BadRequestError
from mindomni_rt.inputs import images

CONFIG = replace(published(), image=ImageConfig(min_pixels=56 * 56, max_pixels=280 * 280))


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize("size", [(100, 60), (28, 28), (301, 7), (640, 480), (56, 399)])
def test_patches_agree_with_transformers(size: tuple[int, int]) -> None:
    from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as theirs_module

    processor = theirs_module.Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=280 * 280)
    image = photo(*size)
    found = images.prepare_image(image, CONFIG, max_tokens=None)
    # The chat utility's own pass comes first: nearest multiples of 28, between 4·28² and 16384·28² pixels.
    rows, columns = images.smart_resize(image.height, image.width, 28, 4 * 28 * 28, 16384 * 28 * 28)
    expected = processor(image.resize((columns, rows), Image.Resampling.BICUBIC), return_tensors="np")
    assert tuple(expected["image_grid_thw"][0]) == found.grid
    np.testing.assert_allclose(found.patches, expected["pixel_values"], atol=1e-5)


@settings(max_examples=300, deadline=None)
@given(height=st.integers(1, 5000), width=st.integers(1, 5000), most=st.integers(40, 20000))
def test_resize_keeps_its_promises(height: int, width: int, most: int) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as theirs

    most *= 28 * 28
    if max(height, width) / min(height, width) > 200:
        with pytest.raises(BadRequestError, match="aspect ratio"):
            images.smart_resize(height, width, 28, 3136, most)
        return
    rows, columns = images.smart_resize(height, width, 28, 3136, most)
    assert rows % 28 == columns % 28 == 0
    assert rows * columns >= 3136
    assert rows * columns <= most or min(rows, columns) == 28
    # The released code's first pass is the chat utility's, which lifts a side to 28 before it looks at the area;
    # transformers' own rule, the second pass, never meets such a side.
    if min(height, width) > 14:
        assert (rows, columns) == theirs(height, width, 28, 3136, most)


@pytest.mark.parametrize("case", ["understand_image", "edit_think_image"])
def test_patches_agree_with_the_released_code(case: str) -> None:
    _, arrays = load_case(case)
    limits = json.loads((PARITY / "mllm" / "preprocessor_config.json").read_text(encoding="utf-8"))
    image = ImageConfig(min_pixels=limits["min_pixels"], max_pixels=limits["max_pixels"])
    found = images.prepare_image(PARITY / "cases" / "scene.png", replace(published(), image=image))
    assert [list(found.grid)] == arrays["generate_input_0.image_grid_thw"].tolist()
    np.testing.assert_allclose(found.patches, arrays["generate_input_0.pixel_values"], atol=2e-6)
    assert (found.size, found.original_size, found.capped, found.tokens) == ((84, 112), (72, 100), False, 12)


def test_a_cap_that_does_not_bite_changes_nothing() -> None:
    """The checkpoint's own limit (100 tokens) is below the cap: both passes must be the released code's."""
    image = photo(900, 700)
    free = images.prepare_image(image, CONFIG, max_tokens=None)
    capped = images.prepare_image(image, CONFIG, max_tokens=101)
    assert not capped.capped and np.array_equal(free.patches, capped.patches)


@settings(max_examples=40, deadline=None)
@given(height=st.integers(1, 400), width=st.integers(1, 400), cap=st.integers(4, 200))
def test_a_cap_equals_a_lower_limit(height: int, width: int, cap: int) -> None:
    assume(max(height, width) / min(height, width) <= 200)
    image = Image.new("RGB", (width, height))
    found = images.prepare_image(image, CONFIG, max_tokens=cap)
    limit = min(CONFIG.image.max_pixels, cap * 28 * 28)
    lower = replace(CONFIG, image=ImageConfig(min_pixels=min(3136, limit), max_pixels=limit))
    assert found.grid == images.prepare_image(image, lower, max_tokens=None).grid
    assert found.tokens <= cap or min(found.size) == 28
    assert found.patches.shape == (found.grid[1] * found.grid[2], 1176)


def test_a_large_photo_is_capped_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    image = Image.new("RGB", (4000, 3000))
    with caplog.at_level(logging.WARNING):
        capped = images.prepare_image(image, published())
    assert capped.capped and capped.tokens <= images.DEFAULT_IMAGE_TOKENS
    assert "reduced" in caplog.text and "15301 without it" in caplog.text
    caplog.clear()
    small = images.prepare_image(photo(300, 200), published())
    assert not small.capped and not caplog.text


@pytest.mark.parametrize("source", [b"", b"not an image", Path("missing.png"), "tests", 7, np.zeros((4, 4)), None])
def test_unreadable_images_are_named_errors(source: object) -> None:
    with pytest.raises(BadRequestError, match="image"):
        images.open_image(source)


def test_a_truncated_file_is_an_error(tmp_path: Path) -> None:
    photo(64, 64).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    with pytest.raises(BadRequestError, match="cannot be read"):
        images.open_image(data[: len(data) // 2])


@pytest.mark.filterwarnings("ignore")  # Pillow warns about the damage too
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "TGA", "DDS", "ICO"])
def test_damaged_files_raise_nothing_else(kind: str) -> None:
    """Flipped and missing bytes: an image or the named error, never another exception."""
    buffer, draw = io.BytesIO(), random.Random(kind)
    photo(24, 20).save(buffer, kind)
    for _ in range(60):
        data = bytearray(buffer.getvalue())
        for _ in range(draw.randint(1, 6)):
            data[draw.randrange(min(len(data), draw.choice([40, 200])))] = draw.randrange(256)
        with contextlib.suppress(BadRequestError):
            images.open_image(bytes(data[: draw.choice([len(data), draw.randrange(len(data))])]))


def png_header(width: int, height: int) -> bytes:
    """A small file that claims to be a large picture."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


def test_a_decompression_bomb_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bomb.png").write_bytes(png_header(60000, 60000))
    for read in (images.open_image, images.read_settings, lambda path: images.prepare_image(path, published())):
        with pytest.raises(BadRequestError, match="cannot be read"):
            read(tmp_path / "bomb.png")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "F"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    assert images.open_image(Image.new(mode, (5, 3))).mode == "RGB"


@pytest.mark.parametrize("source", [Image.new("RGB", (0, 5)), np.zeros((0, 5, 3), np.uint8)])
def test_empty_images_are_refused(source: object) -> None:
    with pytest.raises(BadRequestError):
        images.open_image(source)


def test_orientation_is_applied() -> None:
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[274] = 6  # rotated by 90 degrees
    photo(40, 20).save(buffer, "JPEG", exif=exif)
    assert images.open_image(buffer.getvalue()).size == (20, 40)


def test_png_carries_its_settings(tmp_path: Path) -> None:
    made = {"prompt": "три кошки 🐈", "seed": 3, "guidance_scale": 2.5}
    images.save_image(photo(16, 16), tmp_path / "a.png", made)
    assert images.read_settings(tmp_path / "a.png") == made
    photo(16, 16).save(tmp_path / "b.png")
    with pytest.raises(BadRequestError, match="no settings"):
        images.read_settings(tmp_path / "b.png")
    with pytest.raises(BadRequestError, match="cannot write"):
        images.save_image(photo(16, 16), tmp_path / "none" / "a.png", made)
    assert [p.name for p in tmp_path.iterdir()] and not list(tmp_path.glob("*.partial"))


def test_settings_of_any_kind_survive(tmp_path: Path) -> None:
    made = {"prompt": "a\ud800b", "seed": np.int64(3), "sizes": np.arange(2), "path": Path("x")}
    images.save_image(photo(8, 8), tmp_path / "a.png", made)
    assert images.read_settings(tmp_path / "a.png") == {**made, "seed": 3, "sizes": [0, 1], "path": "x"}
    assert Image.open(tmp_path / "a.png").text["prompt"] == "a?b"  # type: ignore[attr-defined]


@pytest.mark.parametrize("text", ["{bad", "[1]"])
def test_foreign_settings_are_named_errors(tmp_path: Path, text: str) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_itxt("mindomni", text)
    photo(8, 8).save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(BadRequestError, match="its settings are"):
        images.read_settings(tmp_path / "a.png")


def test_missing_numbers_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    pixels = np.array([[[[np.nan, 0.5, 2.0]]]], np.float32)
    assert images.pixels_to_uint8(pixels).tolist() == [[[[0, 127, 255]]]]
    assert "1 of 3 pixel values are NaN" in caplog.text


def test_pixels_truncate() -> None:
    pixels = np.full((1, 1, 1, 3), 0.999, np.float32)
    assert np.asarray(images.to_pil(pixels)[0]).max() == 254


def test_pixels_for_the_vae() -> None:
    pixels = images.vae_pixels(photo(100, 50))
    assert pixels.shape == (1, 3, 48, 96) and pixels.min() >= -1 and pixels.max() <= 1
    assert images.vae_pixels(photo(4096, 20)).shape[-1] == 1024
