"""Image preparation against transformers' own processor, and bad images."""

from __future__ import annotations

import io
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mindomni_rt import images
from mindomni_rt.config import ImageConfig, published
from mindomni_rt.errors import BadRequestError

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


@settings(max_examples=200, deadline=None)
@given(height=st.integers(1, 5000), width=st.integers(1, 5000))
def test_resize_keeps_its_promises(height: int, width: int) -> None:
    if max(height, width) / min(height, width) > 200:
        with pytest.raises(BadRequestError, match="aspect ratio"):
            images.smart_resize(height, width, 28, 3136, 10**6)
        return
    rows, columns = images.smart_resize(height, width, 28, 3136, 10**6)
    assert rows % 28 == columns % 28 == 0
    assert rows * columns >= 3136
    if max(height, width) / min(height, width) < 20:
        assert rows * columns <= 10**6
        assert abs(np.log((rows / columns) / (height / width))) < np.log(2.1)


def test_a_large_photo_is_capped_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    image = Image.new("RGB", (4000, 3000))
    with caplog.at_level(logging.WARNING):
        capped = images.prepare_image(image, published())
    assert capped.capped and capped.tokens <= images.DEFAULT_IMAGE_TOKENS
    assert "reduced" in caplog.text and "15301 without it" in caplog.text
    caplog.clear()
    small = images.prepare_image(photo(300, 200), published())
    assert not small.capped and not caplog.text


@pytest.mark.parametrize("source", [b"", b"not an image", Path("missing.png"), "tests", 7, np.zeros((4, 4))])
def test_unreadable_images_are_named_errors(source: object) -> None:
    with pytest.raises(BadRequestError, match="image"):
        images.load_image(source)


def test_a_truncated_file_is_an_error(tmp_path: Path) -> None:
    photo(64, 64).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    with pytest.raises(BadRequestError, match="cannot be read"):
        images.load_image(data[: len(data) // 2])


def test_orientation_is_applied() -> None:
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[274] = 6  # rotated by 90 degrees
    photo(40, 20).save(buffer, "JPEG", exif=exif)
    assert images.load_image(buffer.getvalue()).size == (20, 40)


def test_png_carries_its_settings(tmp_path: Path) -> None:
    made = {"prompt": "три кошки 🐈", "seed": 3, "guidance_scale": 2.5}
    images.save_png(photo(16, 16), tmp_path / "a.png", made)
    assert images.read_settings(tmp_path / "a.png") == made
    photo(16, 16).save(tmp_path / "b.png")
    with pytest.raises(BadRequestError, match="no settings"):
        images.read_settings(tmp_path / "b.png")
    with pytest.raises(BadRequestError, match="cannot write"):
        images.save_png(photo(16, 16), tmp_path / "none" / "a.png", made)
    assert [p.name for p in tmp_path.iterdir()] and not list(tmp_path.glob("*.partial"))


def test_pixels_truncate() -> None:
    pixels = np.full((1, 1, 1, 3), 0.999, np.float32)
    assert np.asarray(images.to_pil(pixels)[0]).max() == 254


def test_pixels_for_the_vae() -> None:
    pixels = images.vae_pixels(photo(100, 50))
    assert pixels.shape == (1, 3, 48, 96) and pixels.min() >= -1 and pixels.max() <= 1
    assert images.vae_pixels(photo(4096, 20)).shape[-1] == 1024
