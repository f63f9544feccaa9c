"""The VAE's norms over pictures that lie channels-last: no copy into another layout between two convolutions."""

from __future__ import annotations

import torch
from torch import Tensor

from mindomni_rt.kernels.group_norm import group_moments, group_norm

from ...model.norm import GroupNorm, Moments
from ...model.vae import AutoencoderKL


class PictureNorm(GroupNorm):
    """A norm by our kernels. impl: as everywhere in `kernels`."""

    def __init__(self, norm: GroupNorm, impl: str) -> None:
        super().__init__(norm.num_groups, norm.num_channels, norm.eps, device="meta")
        self.weight, self.bias, self.impl = norm.weight, norm.bias, impl

    def forward(self, x: Tensor, silu: bool = False) -> Tensor:
        return self._norm(x, silu)

    def moments(self, x: Tensor) -> Moments:
        return group_moments(x, self.num_groups, self.impl)

    def of_part(self, x: Tensor, moments: Moments) -> Tensor:
        return self._norm(x, True, moments)

    def _norm(self, x: Tensor, silu: bool, moments: Moments | None = None) -> Tensor:
        return group_norm(x, self.num_groups, self.weight, self.bias, self.eps, silu, moments, self.impl)


def lay_channels_last(vae: AutoencoderKL, impl: str) -> None:
    """Stores the weights as convolutions in 16 bits want them, and puts `PictureNorm`s in the place of the norms."""
    vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for module in list(vae.modules()):
        for name, child in module.named_children():
            if isinstance(child, GroupNorm):
                setattr(module, name, PictureNorm(child, impl))
