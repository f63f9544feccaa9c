"""Stage `vae`: diffusers' AutoencoderKL as SDXL uses it, under diffusers' tensor names.

Pictures of up to `tile` latents a side run whole. Larger ones run in stripes of rows, layer by layer, with the
statistics of the whole picture (`stripes`): equal to the whole up to rounding.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from ..checkpoint.config import VAEConfig
from ..errors import BadCheckpointError, BadRequestError
from ..stages import VAE_TILE as TILE
from .norm import GroupNorm
from .stripes import Stripes


class _Resnet(nn.Module):
    def __init__(self, channels_in: int, channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, channels_in, eps=1e-6)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.norm2 = GroupNorm(groups, channels, eps=1e-6)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        if channels_in != channels:
            self.conv_shortcut = nn.Conv2d(channels_in, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(self.norm1(x, silu=True))
        h = self.conv2(self.norm2(h, silu=True))
        return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class _Attention(nn.Module):
    """One head over all places, as wide as the channels."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = GroupNorm(groups, channels, eps=1e-6)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        h = self.group_norm(x).flatten(2).transpose(1, 2).unsqueeze(1)  # (B, 1, places, C)
        h = F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h))
        return x + self.to_out[0](h).squeeze(1).transpose(1, 2).reshape(x.shape)


class _MidBlock(nn.Module):
    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(_Resnet(channels, channels, groups) for _ in range(2))
        self.attentions = nn.ModuleList([_Attention(channels, groups)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class _Sampler(nn.Module):
    """Halves or doubles the sides; the convolution is called `conv` in the file."""

    def __init__(self, channels: int, up: bool) -> None:
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(channels, channels, 3, stride=1 if up else 2, padding=1 if up else 0)

    def forward(self, x: Tensor) -> Tensor:
        # Downwards, SDXL pads right and bottom only.
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest") if self.up else F.pad(x, (0, 1, 0, 1)))


class _Level(nn.Module):
    def __init__(self, channels_in: int, channels: int, layers: int, groups: int, sampler: str | None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            _Resnet(channels_in if i == 0 else channels, channels, groups) for i in range(layers)
        )
        self.sampler = sampler
        if sampler:
            setattr(self, sampler, nn.ModuleList([_Sampler(channels, up=sampler == "upsamplers")]))

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        return getattr(self, self.sampler)[0](x) if self.sampler else x


class _Encoder(nn.Module):
    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            _Level(before, width, config.layers_per_block, groups, None if width_is_last else "downsamplers")
            for before, width, width_is_last in zip(
                (widths[0], *widths[:-1]), widths, [False] * (len(widths) - 1) + [True], strict=True
            )
        )
        self.mid_block = _MidBlock(widths[-1], groups)
        self.conv_norm_out = GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(self.conv_norm_out(self.mid_block(x), silu=True))


class _Decoder(nn.Module):
    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = _MidBlock(widths[0], groups)
        self.up_blocks = nn.ModuleList(
            _Level(before, width, config.layers_per_block + 1, groups, None if width_is_last else "upsamplers")
            for before, width, width_is_last in zip(
                (widths[0], *widths[:-1]), widths, [False] * (len(widths) - 1) + [True], strict=True
            )
        )
        self.conv_norm_out = GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(self.conv_norm_out(x, silu=True))


class AutoencoderKL(nn.Module):
    """Encoder and decoder; `encoder` and `quant_conv` are None when a checkpoint has only the decoder.

    room: bytes of the device that a large picture's activations may take between layers; the host has those of others.
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.room = 0
        self.config = config
        self.encoder: _Encoder | None = _Encoder(config)
        self.decoder = _Decoder(config)
        self.quant_conv: nn.Conv2d | None = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def decode(self, latents: Tensor, tile: int | None = TILE) -> Tensor:
        """Latents (B, 4, h, w), already divided by the scaling factor -> pixels (B, 3, 8h, 8w), about [-1, 1].

        tile: the largest side in latents that is decoded whole, at least 2; None decodes any size whole.
        """
        x = self.post_quant_conv(latents)
        stripes = self._stripes(latents, tile, 1)
        return self.decoder(x) if stripes is None else stripes.decode(self.decoder, x)

    def encode(self, pixels: Tensor, tile: int | None = TILE) -> tuple[Tensor, Tensor]:
        """Pixels (B, 3, H, W) in [-1, 1], sides multiples of 8 -> mean and log-variance (B, 4, H/8, W/8), unscaled.

        tile: as in `decode`, in latents. Raises BadCheckpointError if the checkpoint had no encoder.
        """
        if self.encoder is None or self.quant_conv is None:
            raise BadCheckpointError("this checkpoint has no VAE encoder: it can decode, not encode images")
        stripes = self._stripes(pixels, tile, self.config.downscale)
        moments = self.encoder(pixels) if stripes is None else stripes.encode(self.encoder, pixels)
        mean, logvar = self.quant_conv(moments).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def _stripes(self, x: Tensor, tile: int | None, unit: int) -> Stripes | None:
        """How x runs in stripes of a quarter of a tile; None: whole. unit: places of x a latent."""
        if tile is None:
            return None
        if tile < 2:
            raise BadRequestError(f"tile = {tile}: expected at least 2 latents a side, or None for no tiles")
        height, width = x.shape[-2:]
        if height % unit or width % unit:
            raise BadRequestError(f"image of {width}x{height} pixels: sides must be multiples of {unit}")
        if max(height, width) <= tile * unit:
            return None
        pixels = height * width * (self.config.downscale // unit) ** 2
        widths, weight = self.config.block_out_channels, self.post_quant_conv.weight
        waiting = (widths[0] + max(widths[:2])) * x.shape[0] * pixels * weight.element_size()  # of the largest layer
        return Stripes(tile, self.config.downscale, self.decoder.conv_norm_out, on_host=waiting > self.room)
