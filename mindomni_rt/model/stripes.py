"""Large pictures through the VAE in stripes of rows, equal to the whole up to rounding.

GroupNorm needs statistics of the whole picture, so a layer runs over all stripes before the next one starts. Each
stripe adds its rows, mean and variance to the statistics of the norm that follows; a convolution reads the rows above
and below its stripe from the neighbours. Only the normalization of those rows is computed twice. Between layers the
activations wait on the device where the caller gives them room there, else in host memory, pinned where the device is a
GPU: the input and output of one layer; rows that no later stripe reads are freed. The middle block runs whole, at the
resolution of the latents, with its queries in chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .norm import GroupNorm

Block = Any
"""A block of `vae`, which imports this module."""
Prepare = Callable[[Tensor], Tensor]


class _Parked:
    """A picture's activations as stripes of rows, and the statistics of their groups. on_host: where stripes wait."""

    def __init__(self, height: int, width: int, device: torch.device, on_host: bool) -> None:
        self.height, self.width, self.device, self.on_host = height, width, device, on_host
        self._stripes: list[tuple[int, Tensor]] = []  # first row, (B, C, rows, W)
        self._moments: list[tuple[Tensor, Tensor, Tensor]] = []  # share of the picture, variance, mean

    def like(self, height: int, width: int) -> _Parked:
        """An empty one that waits in the same place."""
        return _Parked(height, width, self.device, self.on_host)

    def add(self, top: int, stripe: Tensor, norm: GroupNorm) -> None:
        share = stripe.new_full((1, 1), stripe.shape[2] / self.height, dtype=torch.float32)
        self._moments.append((share, *norm.moments(stripe)))
        self._stripes.append((top, _on_host(stripe) if self.on_host and self.device.type == "cuda" else stripe))

    def rows(self, top: int, bottom: int) -> Tensor:
        """Rows [top, bottom), on the device."""
        parts = [
            stripe[:, :, max(top - first, 0) : bottom - first].to(self.device, non_blocking=True)
            for first, stripe in self._stripes
            if first < bottom and first + stripe.shape[2] > top
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def free(self, bottom: int) -> None:
        """Drops the stripes that lie above row `bottom`."""
        self._stripes = [(first, stripe) for first, stripe in self._stripes if first + stripe.shape[2] > bottom]

    def norm(self, layer: GroupNorm) -> Prepare:
        """The layer, with the statistics of the whole picture, and the SiLU after it."""
        shares, variances, means = (torch.stack(each) for each in zip(*self._moments, strict=True))
        mean = (shares * means).sum(0)
        moments = (shares * (variances + (means - mean).square())).sum(0), mean
        return lambda x: layer.of_part(x, moments)


class Stripes:
    """Runs the decoder or encoder of an AutoencoderKL in stripes of a quarter of a tile (two rows at least).

    tile: side of a tile in latents; downscale: pixels a latent along a side; norm: any of the norms, all of which have
    the same groups; on_host: where activations wait between layers.
    """

    def __init__(self, tile: int, downscale: int, norm: GroupNorm, on_host: bool = True) -> None:
        self.area, self.norm = (tile * downscale) ** 2 // 4, norm
        self.on_host = on_host
        self.scores = tile**4

    def decode(self, decoder: Block, latents: Tensor) -> Tensor:
        x = self._park(self._middle(decoder.mid_block, decoder.conv_in(latents)))
        for level in decoder.up_blocks:
            x = self._level(level, x)
        return torch.cat(list(self._convolved(x, decoder.conv_out, x.norm(decoder.conv_norm_out))), dim=2)

    def encode(self, encoder: Block, pixels: Tensor) -> Tensor:
        x = _Parked(pixels.shape[2], pixels.shape[3], pixels.device, self.on_host)
        for top, bottom in self._ranges(x.height, x.width):
            above, below = max(top - 1, 0), min(bottom + 1, x.height)
            x.add(top, _between(encoder.conv_in, pixels[:, :, above:below], top == 0, bottom == x.height), self.norm)
        for level in encoder.down_blocks:
            x = self._level(level, x)
        whole = self._middle(encoder.mid_block, x.rows(0, x.height))
        return encoder.conv_out(encoder.conv_norm_out(whole, silu=True))

    def _ranges(self, height: int, width: int) -> list[tuple[int, int]]:
        rows = max(2, self.area // width // 2 * 2)  # even, so that halving the rows never splits a pair
        return [(top, min(top + rows, height)) for top in range(0, height, rows)]

    def _park(self, x: Tensor) -> _Parked:
        parked = _Parked(x.shape[2], x.shape[3], x.device, self.on_host)
        parked.add(0, x, self.norm)
        return parked

    def _middle(self, block: Block, x: Tensor) -> Tensor:
        return block.resnets[1](self._attention(block.attentions[0], block.resnets[0](x)))

    def _attention(self, layer: Block, x: Tensor) -> Tensor:
        h = layer.group_norm(x).flatten(2).transpose(1, 2).unsqueeze(1)
        q, k, v = layer.to_q(h), layer.to_k(h), layer.to_v(h)
        # As many scores at once as one whole tile has, for devices whose attention writes them out.
        chunk = max(1, self.scores // h.shape[2])
        h = torch.cat([F.scaled_dot_product_attention(part, k, v) for part in q.split(chunk, dim=2)], dim=2)
        return x + layer.to_out[0](h).squeeze(1).transpose(1, 2).reshape(x.shape)

    def _level(self, level: Block, x: _Parked) -> _Parked:
        for resnet in level.resnets:
            x = self._resnet(resnet, x)
        if not level.sampler:
            return x
        sampler = getattr(level, level.sampler)[0]
        return self._doubled(sampler.conv, x) if sampler.up else self._halved(sampler.conv, x)

    def _resnet(self, block: Block, x: _Parked) -> _Parked:
        h, out = (x.like(x.height, x.width) for _ in range(2))
        ranges = self._ranges(x.height, x.width)
        for (top, _), part in zip(ranges, self._convolved(x, block.conv1, x.norm(block.norm1), keep=True), strict=True):
            h.add(top, part, self.norm)
        convolved = self._convolved(h, block.conv2, h.norm(block.norm2))
        for (top, bottom), part in zip(ranges, convolved, strict=True):
            kept = x.rows(top, bottom)
            out.add(top, part + (block.conv_shortcut(kept) if hasattr(block, "conv_shortcut") else kept), self.norm)
            x.free(bottom)
        return out

    def _convolved(self, x: _Parked, conv: nn.Conv2d, prepare: Prepare, *, keep: bool = False) -> Iterator[Tensor]:
        for top, bottom in self._ranges(x.height, x.width):
            part = prepare(x.rows(max(top - 1, 0), min(bottom + 1, x.height)))
            if not keep:
                x.free(bottom - 1)
            yield _between(conv, part, top == 0, bottom == x.height)

    def _doubled(self, conv: nn.Conv2d, x: _Parked) -> _Parked:
        out = x.like(2 * x.height, 2 * x.width)
        for top, bottom in self._ranges(x.height, 4 * x.width):
            first, last = top == 0, bottom == x.height
            part = F.interpolate(x.rows(max(top - 1, 0), min(bottom + 1, x.height)), scale_factor=2.0, mode="nearest")
            part = part[:, :, 0 if first else 1 : part.shape[2] - (0 if last else 1)]
            x.free(bottom - 1)
            out.add(2 * top, _between(conv, part, first, last), self.norm)
        return out

    def _halved(self, conv: nn.Conv2d, x: _Parked) -> _Parked:
        out = x.like(x.height // 2, x.width // 2)
        for top, bottom in self._ranges(x.height, x.width):
            last = bottom == x.height
            part = F.pad(x.rows(top, bottom if last else bottom + 1), (0, 1, 0, 1 if last else 0))
            x.free(bottom)
            out.add(top // 2, conv(part), self.norm)
        return out


def _between(conv: nn.Conv2d, x: Tensor, first: bool, last: bool) -> Tensor:
    """A 3x3 convolution over rows that bring their neighbours along: zeros stand only outside of the picture.

    Zeros on one side alone would need a copy of x: they come on both, and the row that is one too many is dropped.
    """
    outside = first or last
    y = F.conv2d(x, conv.weight, conv.bias, padding=(int(outside), 1))
    return y[:, :, int(outside and not first) : y.shape[2] - int(outside and not last)]


def _on_host(stripe: Tensor) -> Tensor:
    """A pinned copy. The host waits for it unless whole rows lie together: others are gathered by the host later."""
    together = stripe.shape[0] == 1 and stripe.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if together else torch.contiguous_format
    host = torch.empty(stripe.shape, dtype=stripe.dtype, pin_memory=True, memory_format=layout)
    return host.copy_(stripe, non_blocking=together)
