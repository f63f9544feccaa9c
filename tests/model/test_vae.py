"""The VAE against diffusers' AutoencoderKL, and tiles against the whole."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL as Theirs
from hypothesis import given, settings
from hypothesis import strategies as st

from mindomni_rt.checkpoint.config import VAEConfig
from mindomni_rt.errors import BadCheckpointError, BadRequestError
from mindomni_rt.model import stripes
from mindomni_rt.model.mindomni import load_model
from mindomni_rt.model.vae import AutoencoderKL
from mindomni_rt.sampling.tiling import tiled as in_tiles

ROOT = Path(__file__).resolve().parents[2]


def pair(widths: tuple[int, ...], layers: int, groups: int) -> tuple[Theirs, AutoencoderKL]:
    torch.manual_seed(layers)
    theirs = Theirs(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=layers,
        norm_num_groups=groups,
        latent_channels=4,
    ).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    ours = AutoencoderKL(VAEConfig(block_out_channels=widths, layers_per_block=layers, norm_num_groups=groups))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


@pytest.mark.parametrize(("widths", "layers", "groups"), [((8, 16), 1, 4), ((8, 8, 16, 16), 1, 4), ((8, 16, 24), 2, 8)])
@pytest.mark.parametrize("size", [(6, 6), (3, 10)])
def test_agrees_with_diffusers(widths: tuple[int, ...], layers: int, groups: int, size: tuple[int, int]) -> None:
    theirs, ours = pair(widths, layers, groups)
    latents = torch.randn(2, 4, *size)
    pixels = torch.randn(2, 3, size[0] * ours.config.downscale, size[1] * ours.config.downscale)
    with torch.no_grad():
        torch.testing.assert_close(ours.decode(latents), theirs.decode(latents).sample, rtol=1e-4, atol=1e-4)
        mean, logvar = ours.encode(pixels)
        moments = theirs.encode(pixels).latent_dist
    torch.testing.assert_close(mean, moments.mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logvar, moments.logvar, rtol=1e-4, atol=1e-4)


def beside(array: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(array).to(like)


def test_full_size_on_the_meta_device() -> None:
    with torch.device("meta"):
        ours = AutoencoderKL(VAEConfig())
        theirs = Theirs(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        )
    assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}


@pytest.mark.parametrize("size", [(40, 23), (17, 64)])
def test_tiles_of_a_local_decoder_are_exact(size: tuple[int, int]) -> None:
    """Blending weights sum to one everywhere: a pointwise function survives tiling unchanged."""
    x = torch.randn(1, 4, *size, dtype=torch.float64)
    expected = x.repeat_interleave(8, 2).repeat_interleave(8, 3)
    out = in_tiles(lambda t: t.repeat_interleave(8, 2).repeat_interleave(8, 3), x, 16, place=beside)
    torch.testing.assert_close(out, expected)
    host = in_tiles(lambda t: t.repeat(8, 2).repeat(8, 3), x.numpy(), 16)
    np.testing.assert_allclose(host, expected.numpy(), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(torch.from_numpy(host), out, rtol=0, atol=0)  # both kinds of array, the same numbers


@pytest.mark.parametrize(("widths", "layers", "groups"), [((8, 8, 16, 16), 2, 4), ((16, 32), 1, 8), ((8,), 1, 2)])
@pytest.mark.parametrize(("height", "width", "tile"), [(24, 20, 8), (23, 17, 16), (9, 30, 2), (31, 3, 5)])
def test_stripes_equal_the_whole(
    widths: tuple[int, ...], layers: int, groups: int, height: int, width: int, tile: int
) -> None:
    """Norms see the whole picture whatever the stripes, white noise and odd sizes included."""
    _, ours = pair(widths, layers, groups)
    for norm in (module for module in ours.modules() if isinstance(module, torch.nn.GroupNorm)):
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    latents = torch.randn(2, 4, height, width) + 3
    with torch.no_grad():
        whole = ours.decode(latents, tile=None)
        torch.testing.assert_close(ours.decode(latents, tile=tile), whole, atol=1e-4, rtol=1e-4)
        pixels = whole.clamp(-1, 1)
        expected, striped = ours.encode(pixels, tile=None), ours.encode(pixels, tile=tile)
    for one, other in zip(striped, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_stripes_of_the_small_model_equal_the_whole() -> None:
    """Trained weights: a flat scene with one edge, in stripes of a few rows."""
    ours = load_model(ROOT / "assets/shapes-world", torch.float32, "cpu", vae_dtype=torch.float32)[0].vae
    scale = ours.config.downscale
    pixels = torch.full((1, 3, 15 * scale, 22 * scale), -0.5)
    pixels[:, 0, 3 * scale : 9 * scale, 5 * scale :] = 0.8
    with torch.no_grad():
        mean, striped_mean = ours.encode(pixels, tile=None)[0], ours.encode(pixels, tile=4)[0]
        torch.testing.assert_close(striped_mean, mean, atol=1e-3, rtol=0)
        torch.testing.assert_close(ours.decode(mean, tile=4), ours.decode(mean, tile=None), atol=1e-3, rtol=0)


def test_stripes_hold_one_layers_input_and_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """No convolution sees more than its stripe and two rows; the host holds no more than 384 channels a pixel at the
    published widths, which is the input and output of one layer."""
    _, ours = pair((4, 8, 16, 16), 2, 4)  # the published widths by 32
    live, peak, largest = weakref.WeakSet[torch.Tensor](), 0, 0
    park, convolve = stripes._Parked.add, torch.nn.functional.conv2d

    def add(self: Any, top: int, stripe: torch.Tensor, norm: Any) -> None:
        nonlocal peak
        park(self, top, stripe.clone(), norm)
        live.add(self._stripes[-1][1])
        peak = max(peak, sum(part.numel() for part in live))

    def conv2d(x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, x.shape[2] * x.shape[3])
        return convolve(x, *args, **options)

    monkeypatch.setattr(stripes._Parked, "add", add)
    monkeypatch.setattr(torch.nn.functional, "conv2d", conv2d)
    with torch.no_grad():
        ours.decode(torch.randn(1, 4, 64, 48), tile=16)
    pixels, stripe = 512 * 384, (16 * 8) ** 2 // 4
    assert peak <= 12.5 * pixels
    assert largest <= stripe + 4 * 386


def test_stripes_wait_on_the_device_where_they_have_room() -> None:
    _, ours = pair((8, 16), 1, 4)
    latents = torch.randn(2, 4, 24, 20)
    bytes_needed = (8 + 16) * 2 * 48 * 40 * 4  # input and output of the largest layer
    pixels = torch.randn(2, 3, 48, 40)
    for room, on_host in ((0, True), (bytes_needed - 1, True), (bytes_needed, False)):
        ours.room = room
        for x, unit in ((latents, 1), (pixels, 2)):
            stripes = ours._stripes(x, 8, unit)
            assert stripes is not None and stripes.on_host == on_host


@settings(max_examples=60, deadline=None)
@given(height=st.integers(1, 40), width=st.integers(1, 40), tile=st.integers(2, 20))
def test_tiles_cover_any_size_within_bounds(height: int, width: int, tile: int) -> None:
    """Every place is written, no tile is larger than asked, and blending is exact for a pointwise function."""
    sizes = []

    def run(part: torch.Tensor) -> torch.Tensor:
        sizes.append(part.shape[-2:])
        return part.repeat_interleave(2, 2).repeat_interleave(2, 3)

    x = torch.randn(1, 3, height, width, dtype=torch.float64)
    double = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(in_tiles(run, x, tile, place=beside), double)
    assert max(max(size) for size in sizes) <= tile
    down = in_tiles(lambda part: part[..., ::2, ::2], double, tile, 2, beside)
    torch.testing.assert_close(down, x)


def test_small_images_are_never_tiled() -> None:
    _, ours = pair((8, 16), 1, 4)
    latents = torch.randn(1, 4, 16, 9)
    with torch.no_grad():
        assert torch.equal(ours.decode(latents, tile=16), ours.decode(latents, tile=None))


def test_bad_tiles_and_sizes_are_named_errors() -> None:
    _, ours = pair((8, 16), 1, 4)
    for tile in (-3, 0, 1):
        with pytest.raises(BadRequestError, match="tile"):
            ours.decode(torch.randn(1, 4, 9, 9), tile=tile)
    with pytest.raises(BadRequestError, match="multiples of 2"):
        ours.encode(torch.randn(1, 3, 41, 40), tile=8)
    ours.encoder = None
    with pytest.raises(BadCheckpointError, match="no VAE encoder"):
        ours.encode(torch.randn(1, 3, 16, 16))
