"""Stages `prefix` and `denoiser`: OmniGen's diffusion transformer, cut where its mask allows.

The sequence is [condition (L) | time token (1) | image tokens (N)]. Condition and time are causal and never see the
image, image tokens see everything. So K and V of the condition are the same in every step, the time tokens of all
steps fit one pass beside it (each at position L, seeing the condition and itself), and a denoise step is left with
image tokens that need no mask: `prefix` and `denoise`. `forward` is the whole sequence under its mask: what training
differentiates and what the cut is tested against.

Axes: B batch, L condition tokens, T steps, N image tokens, C hidden, H heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checkpoint.config import DecoderConfig
from ..inputs.positions import image_positions, rope_tables, time_features
from .attention import Workspace, attention, segment_attention
from .block import BlockStack, RMSNorm
from .embedding import Embedding

Keep = Callable[[int, Tensor, Tensor], None]
"""Stores K and V (B, H, L + T, D) of one layer of a prefix pass: (layer, k, v)."""
Span = tuple[int, int]
"""[start, end) of an input image's tokens in the condition: they see each other in both directions."""


@dataclass(frozen=True)
class PrefixKV:
    """K/V of a branch: condition (layers, B, H, L, D) and each step's time token (T, layers, B, H, D)."""

    keys: Tensor
    values: Tensor
    time_keys: Tensor
    time_values: Tensor

    @property
    def length(self) -> int:
        return self.keys.shape[3]


class _PatchEmbed(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        p = config.patch_size
        self.proj = nn.Conv2d(config.latent_channels, config.stack.hidden_size, p, stride=p)

    def forward(self, latents: Tensor) -> Tensor:
        """(B, 4, h, w) -> (B, N, C), rows first."""
        return self.proj(latents).flatten(2).transpose(1, 2)


class _TimeEmbed(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        hidden = config.stack.hidden_size
        self.mlp = nn.Sequential(nn.Linear(config.time_frequencies, hidden), nn.SiLU(), nn.Linear(hidden, hidden))

    def forward(self, features: Tensor) -> Tensor:
        return self.mlp(features)


class _FinalLayer(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        hidden = config.stack.hidden_size
        self.linear = nn.Linear(hidden, config.patch_size**2 * config.latent_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden))

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """x (B, N, C), modulation (2C,) or (B, 1, 2C): shift, then scale."""
        shift, scale = modulation.chunk(2, dim=-1)
        return self.linear(F.layer_norm(x, (x.shape[-1],), eps=1e-6) * (1 + scale) + shift)


class _Stack(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.layers = BlockStack(config.stack)
        self.norm = RMSNorm(config.stack.hidden_size, config.stack.rms_norm_eps)
        if config.text_vocab_size:
            self.embed_tokens = Embedding(config.text_vocab_size, config.stack.hidden_size)


class DiffusionDecoder(nn.Module):
    """The decoder under its published tensor names. See the module's docstring."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.x_embedder = _PatchEmbed(config)
        self.input_x_embedder = _PatchEmbed(config)
        self.time_token = _TimeEmbed(config)
        self.t_embedder = _TimeEmbed(config)
        self.llm = _Stack(config)
        self.final_layer = _FinalLayer(config)

    def modulation(self, features: Tensor) -> Tensor:
        """AdaLN's shift and scale of each time: features (T, 256) -> (T, 2C). Depends on t alone."""
        return self.final_layer.adaLN_modulation(self.t_embedder(features))

    def input_features(self, latents: Tensor, positions: Tensor) -> Tensor:
        """Tokens of an input image's latents (1, 4, h, w) for the condition: (1, N, C)."""
        return self.input_x_embedder(latents) + positions.to(latents.dtype)

    def prefix(self, condition: Tensor, features: Tensor, cos: Tensor, sin: Tensor, visible: Tensor) -> PrefixKV:
        """K and V of the condition and of all time tokens, in one pass. Arguments as in `prefix_pass`."""
        length = condition.shape[1]
        keys: list[Tensor] = []
        values: list[Tensor] = []

        def keep(_: int, k: Tensor, v: Tensor) -> None:
            keys.append(k)
            values.append(v)

        self.prefix_pass(condition, features, cos, sin, visible, keep)
        all_keys, all_values = torch.stack(keys), torch.stack(values)  # (layers, B, H, L + T, D)
        return PrefixKV(
            keys=all_keys[:, :, :, :length].contiguous(),
            values=all_values[:, :, :, :length].contiguous(),
            time_keys=all_keys[:, :, :, length:].permute(3, 0, 1, 2, 4).contiguous(),
            time_values=all_values[:, :, :, length:].permute(3, 0, 1, 2, 4).contiguous(),
        )

    def prefix_pass(
        self, condition: Tensor, features: Tensor, cos: Tensor, sin: Tensor, visible: Tensor, keep: Keep
    ) -> None:
        """Runs condition and time tokens through the blocks and gives each layer's K and V to `keep`.

        condition (B, L, C); features (T, 256), tables (L + T, D/2) or (B, L + T, D/2) and visible (L + T, L + T) or
        (B, 1, L + T, L + T) of `positions.prefix_tables`.
        """
        times = self.time_token(features).expand(condition.shape[0], -1, -1)
        x = torch.cat([condition, times.to(condition.dtype)], dim=1)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keep(layer, k, v)
            return attention(q, k, v, mask=visible)

        last = self.config.stack.num_layers - 1
        x = self.llm.layers(x, cos, sin, attend, last=last)
        keep(last, *self.llm.layers.keys_values(last, x, cos, sin))  # the last layer's output is never read

    def denoise(
        self,
        latents: Tensor,
        keys: Tensor,
        values: Tensor,
        time_keys: Tensor,
        time_values: Tensor,
        modulation: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor,
        condition_only: bool = False,
        workspace: Workspace | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Velocity (B, 4, h, w) of latents (B, 4, h, w) at one step; image tokens only.

        keys, values (layers, B or 1, H, L, D) and time_keys, time_values (layers, B or 1, H, D) of this step, from
        `prefix`; modulation (2C,); tables (N, D/2) or (B, N, D/2) at positions L+1…L+N; positions (N, C).
        condition_only: keys are the condition's alone, as in the first step of the released code with its cache on.
        mask (B, 1, 1, L + 1 + N): which keys are real, for padded batches; none is needed otherwise.
        """

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            segments = [(keys[layer], values[layer])]
            if not condition_only:
                segments += [(time_keys[layer].unsqueeze(2), time_values[layer].unsqueeze(2)), (k, v)]
            return segment_attention(q, segments, workspace, mask)

        # Not through __call__, which would hold the first block's input until the last is done.
        x = self.llm.layers.forward(self.image_features(latents, positions), cos, sin, attend)
        return self.velocity(x, modulation, *latents.shape[-2:])

    def image_features(self, latents: Tensor, positions: Tensor) -> Tensor:
        """Image tokens (B, N, C) of the latents (B, 4, h, w) that are denoised."""
        return self.x_embedder(latents) + positions.to(latents.dtype)

    def velocity(self, x: Tensor, modulation: Tensor, height: int, width: int) -> Tensor:
        """Last hidden states of image tokens (B, N, C) -> velocity (B, 4, height, width)."""
        x = self.final_layer(self.llm.norm(x), modulation)
        p = self.config.patch_size
        x = x.reshape(-1, height // p, width // p, p, p, self.config.latent_channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.config.latent_channels, height, width)

    def forward(
        self,
        condition: Tensor,
        latents: Tensor,
        times: Tensor,
        lengths: Sequence[int] | None = None,
        blocks: Sequence[Sequence[Span]] = (),
        feature_maps: list[Tensor] | None = None,
    ) -> Tensor:
        """Velocity (B, 4, h, w) by one pass of the whole sequence under the mask.

        condition (B, Lmax, C), right-padded with `lengths` real tokens a row; times (B,) in [0, 1]; blocks: spans of
        input-image tokens for each row. feature_maps, when given, receives the image tokens' states (B, N, C) at the
        input of each layer and after the final norm (layers + 1 maps), which distillation compares.
        """
        batch, longest = condition.shape[:2]
        lengths = list(lengths) if lengths is not None else [longest] * batch
        height, width = latents.shape[-2:]
        rows, columns = height // self.config.patch_size, width // self.config.patch_size
        count = rows * columns
        device, dtype = condition.device, condition.dtype
        cos, sin = (torch.from_numpy(t).to(device) for t in self.whole_tables(lengths, longest, count))
        features = torch.from_numpy(time_features(times.detach().float().cpu().numpy(), self.config.time_frequencies))
        features = features.to(device, dtype)
        positions = torch.from_numpy(image_positions(self.config, rows, columns)).to(device, dtype)

        image = self.x_embedder(latents.to(dtype)) + positions
        x = torch.cat([condition, self.time_token(features).unsqueeze(1), image], dim=1)
        mask = self.whole_mask(lengths, longest, count, blocks, device)
        for layer in self.llm.layers:
            if feature_maps is not None:
                feature_maps.append(x[:, -count:])
            x = layer(x, cos, sin, lambda q, k, v: attention(q, k, v, mask=mask))
        if feature_maps is not None:
            feature_maps.append(self.llm.norm(x[:, -count:]))
        return self.velocity(x[:, -count:], self.modulation(features).unsqueeze(1), height, width)

    def whole_tables(self, lengths: Sequence[int], longest: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Tables (B, Lmax + 1 + N, D/2); padding repeats a position, which no one sees."""
        stack = self.config.stack
        tables = []
        for length in lengths:
            place = np.concatenate([np.minimum(np.arange(longest), length), np.arange(length, length + 1 + count)])
            tables.append(rope_tables(stack.rope, stack.head_dim, place, length + 1 + count))
        return np.stack([cos for cos, _ in tables]), np.stack([sin for _, sin in tables])

    @staticmethod
    def whole_mask(
        lengths: Sequence[int],
        longest: int,
        count: int,
        blocks: Sequence[Sequence[Span]],
        device: torch.device,
    ) -> Tensor:
        """(B, 1, S, S), True = may attend. Padded rows see themselves only, so that no softmax is empty."""
        total = longest + 1 + count
        place = torch.arange(total, device=device)
        length = torch.tensor(list(lengths), device=device).view(-1, 1, 1)
        row, column = place.view(1, -1, 1), place.view(1, 1, -1)
        real = (column < length) | (column >= longest)
        mask = real & ((column <= row) | (row > longest))
        for index, spans in enumerate(blocks):
            for start, end in spans:
                inside = (place >= start) & (place < end)
                mask[index] |= inside[:, None] & inside[None, :]
        return (mask | (row == column)).unsqueeze(1)
