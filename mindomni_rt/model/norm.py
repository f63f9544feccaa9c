"""GroupNorm of the VAE, with the SiLU after it, and with the statistics of a whole picture over a part of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Moments = tuple[Tensor, Tensor]
"""Variance and mean of each group, both (B, groups) float32."""


class GroupNorm(nn.GroupNorm):
    """torch's, with three uses. The fast path puts its own in its place (`backends.fast.picture_norm`)."""

    def forward(self, x: Tensor, silu: bool = False) -> Tensor:
        y = super().forward(x)
        return F.silu(y) if silu else y

    def moments(self, x: Tensor) -> Moments:
        """Of each group of x (B, C, H, W)."""
        variance, mean = torch.var_mean(x.float().reshape(x.shape[0], self.num_groups, -1), dim=-1, correction=0)
        return variance, mean

    def of_part(self, x: Tensor, moments: Moments) -> Tensor:
        """The norm and SiLU of x, with statistics of the picture that x is a part of."""
        each = self.num_channels // self.num_groups
        variance, mean = (moment.repeat_interleave(each, 1) for moment in moments)
        scale = torch.rsqrt(variance + self.eps) * self.weight.float()
        shift = self.bias.float() - mean * scale
        return F.silu(torch.addcmul(shift[..., None, None], x.float(), scale[..., None, None]).to(x.dtype))
