"""GroupNorm and SiLU over channels-last pictures against their meaning in float64."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import DEVICE, FLOATS, TOLERANCE, error
from torch.nn import functional as F

from mindomni_rt.backends.fast.picture_norm import PictureNorm, lay_channels_last
from mindomni_rt.checkpoint.config import VAEConfig
from mindomni_rt.kernels import group_norm as module
from mindomni_rt.kernels.group_norm import channels_last, group_moments, group_norm
from mindomni_rt.model.vae import AutoencoderKL


def picture(*shape: int, dtype: torch.dtype = torch.float32, mean: float = 0.0, seed: int = 0) -> torch.Tensor:
    """Channels of their own means and deviations, stored channels-last."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    x = x * (0.5 + torch.rand(1, shape[1], 1, 1, generator=generator, dtype=torch.float64)) + mean
    x += torch.randn(1, shape[1], 1, 1, generator=generator, dtype=torch.float64)
    return x.to(DEVICE, dtype).contiguous(memory_format=torch.channels_last)


def affine(channels: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(2, channels, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return x[0].to(DEVICE, dtype), x[1].to(DEVICE, dtype)


CASES = [
    ((1, 64, 1, 1), 32), ((2, 64, 7, 9), 32), ((1, 24, 5, 3), 8), ((2, 96, 17, 33), 1), ((1, 3, 2, 5), 1),
    ((1, 128, 35, 34), 32), ((1, 130, 3, 1), 13),
]  # fmt: skip


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("shape", "groups"), CASES, ids=str)
@pytest.mark.parametrize("silu", [False, True])
def test_agrees_with_torch(shape: tuple[int, ...], groups: int, silu: bool, dtype: torch.dtype) -> None:
    x, (weight, bias) = picture(*shape, dtype=dtype), affine(shape[1], dtype)
    expected = F.group_norm(x.double(), groups, weight.double(), bias.double(), 1e-6)
    found = group_norm(x, groups, weight, bias, 1e-6, silu, impl="triton")
    assert error(found, F.silu(expected) if silu else expected) < TOLERANCE[dtype]
    assert found.dtype == dtype and channels_last(found)


@pytest.mark.parametrize("mean", [100.0, -1e4])
def test_a_mean_far_from_zero_costs_no_digits(mean: float) -> None:
    """Sums of squares lose all digits at a mean of 10,000 deviations. What is left is how float32 rounds the mean."""
    x, groups = picture(2, 64, 30, 41, mean=mean), 32
    rounding = 2e-6 + abs(mean) * 2**-24
    exact = torch.var_mean(x.double().reshape(2, groups, -1), dim=-1, correction=0)
    variance, found = group_moments(x, groups, impl="triton")
    torch.testing.assert_close(variance.double(), exact[0], rtol=rounding, atol=0)
    torch.testing.assert_close(found.double(), exact[1], rtol=2e-7, atol=0)
    weight, bias = affine(64, torch.float32)
    expected = F.group_norm(x.double(), groups, weight.double(), bias.double(), 1e-6)
    assert error(group_norm(x, groups, weight, bias, 1e-6, silu=False, impl="triton"), expected) < rounding


def test_a_part_s_first_place_may_be_an_outlier() -> None:
    """A shift by the first value would put its square into every sum."""
    x = picture(1, 32, 40, 40)
    x[:, :, 0, 0] = 3e4
    exact = torch.var_mean(x.double().reshape(1, 4, -1), dim=-1, correction=0)
    for found, expected in zip(group_moments(x, 4, impl="triton"), exact, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


def test_one_value_has_no_variance() -> None:
    x = torch.full((1, 8, 9, 11), 7.25, device=DEVICE).contiguous(memory_format=torch.channels_last)
    variance, mean = group_moments(x, 2, impl="triton")
    assert (variance == 0).all() and (mean == 7.25).all()


def test_parts_of_any_size_say_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many parts, the last one short; the sums of a group take several turns."""
    x = picture(2, 48, 37, 29)
    whole = group_moments(x, 3, impl="triton")
    monkeypatch.setattr(module, "LARGEST_PART", 32)
    monkeypatch.setattr(module, "COMBINED", 128)
    for found, expected in zip(group_moments(x, 3, impl="triton"), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_part_of_a_picture_with_the_whole_s_moments(impl: str) -> None:
    """Rows of two pictures, not copied: strides of the batch stay the whole picture's."""
    x, (weight, bias) = picture(2, 64, 12, 9), affine(64, torch.float32)
    moments = group_moments(x, 32, impl=impl)
    whole = F.silu(F.group_norm(x.double(), 32, weight.double(), bias.double(), 1e-6))
    found = group_norm(x[:, :, 3:8], 32, weight, bias, 1e-6, moments=moments, impl=impl)
    assert error(found, whole[:, :, 3:8]) < 3e-6


def test_the_same_twice() -> None:
    x, (weight, bias) = picture(1, 64, 40, 40), affine(64, torch.float32)
    one, other = (group_norm(x, 32, weight, bias, 1e-6, impl="triton") for _ in range(2))
    assert torch.equal(one, other)


def test_only_channels_last_pictures() -> None:
    x, (weight, bias) = picture(1, 8, 6, 5).contiguous(), affine(8, torch.float32)
    assert not channels_last(x)
    with pytest.raises(ValueError, match="channels-last"):
        group_norm(x, 4, weight, bias, 1e-6, impl="triton")
    expected = F.silu(F.group_norm(x, 4, weight, bias, 1e-6))
    torch.testing.assert_close(group_norm(x, 4, weight, bias, 1e-6), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("tile", [None, 4])
def test_the_vae_is_the_same(tile: int | None) -> None:
    """Whole and in stripes, coded and decoded, against plain PyTorch over contiguous pictures."""
    torch.manual_seed(0)
    vae = AutoencoderKL(VAEConfig(block_out_channels=(8, 24), layers_per_block=1, norm_num_groups=4)).to(DEVICE)
    for norm in (m for m in vae.modules() if isinstance(m, torch.nn.GroupNorm)):
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    latents, pixels = torch.randn(1, 4, 9, 7, device=DEVICE) + 3, torch.randn(1, 3, 18, 14, device=DEVICE)
    with torch.no_grad():
        expected = vae.decode(latents, tile=None), *vae.encode(pixels, tile=None)
        names = list(vae.state_dict())
        lay_channels_last(vae, "triton")
        found = vae.decode(latents, tile=tile), *vae.encode(pixels, tile=tile)
    assert list(vae.state_dict()) == names
    assert sum(isinstance(m, PictureNorm) for m in vae.modules()) == 24  # 10 of the encoder, 14 of the decoder
    assert channels_last(found[0])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
