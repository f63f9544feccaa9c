"""The VAE against diffusers' AutoencoderKL, and tiles against the whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL as Theirs
from hypothesis import given, settings
from hypothesis import strategies as st

from mindomni_rt.checkpoint.config import VAEConfig
from mindomni_rt.errors import BadCheckpointError, BadRequestError
from mindomni_rt.model.vae import AutoencoderKL
from mindomni_rt.sampling.tiling import tiled as in_tiles


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


def test_tiled_decode_stays_near_the_whole() -> None:
    """What remains is GroupNorm's statistics and attention per tile; the largest seam is no step.

    The bounds are the worst of 24 random models (module docstring of vae.py).
    """
    _, ours = pair((8, 8, 16, 16), 1, 4)
    # Smooth latents, as pictures have: white noise has no large-scale content for the statistics to agree on.
    latents = torch.nn.functional.interpolate(torch.randn(1, 4, 6, 6), size=(48, 40), mode="bicubic")
    with torch.no_grad():
        whole, tiled = ours.decode(latents, tile=None), ours.decode(latents, tile=32)
        pixels = torch.nn.functional.interpolate(whole, size=(384, 320)).clamp(-1, 1)
        encoded, encoded_tiled = ours.encode(pixels, tile=None)[0], ours.encode(pixels, tile=32)[0]
    assert whole.shape == tiled.shape and encoded.shape == encoded_tiled.shape
    assert ((tiled - whole).norm() / whole.norm()).item() < 0.15
    assert ((encoded_tiled - encoded).norm() / encoded.norm()).item() < 0.06
    assert not torch.equal(tiled, whole)  # it did tile
    jumps = (tiled.diff(dim=-1).abs().amax() / whole.diff(dim=-1).abs().amax()).item()
    assert jumps < 1.2


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
