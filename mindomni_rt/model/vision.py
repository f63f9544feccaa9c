"""Stage `vision`: Qwen2.5-VL's vision tower, with attention inside windows in most layers.

The host decides which patches share a window (`vision_layout`), so the module has no shape that depends on data and
exports as it stands. Tensor names are transformers' below `visual.`.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from ..checkpoint.config import VisionConfig
from .attention import attention
from .block import RMSNorm, apply_rope


class _PatchEmbed(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(config.in_channels, config.hidden_size, kernel, stride=kernel, bias=False)

    def forward(self, patches: Tensor) -> Tensor:
        weight = self.proj.weight
        return F.linear(patches.to(weight.dtype), weight.flatten(1))  # the stride equals the kernel: one matrix product


class _Attention(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, windows: tuple[Tensor, Tensor, Tensor] | None) -> Tensor:
        """x (N, C); windows (slots, places, mask), or None for attention over the whole image."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(1, 2, 0, 3).unsqueeze(1)  # (1, H, N, D)
        q, k = apply_rope(q.float(), cos, sin).to(x.dtype), apply_rope(k.float(), cos, sin).to(x.dtype)
        if windows is None:
            out = attention(q, k, v)
        else:
            slots, places, mask = windows
            q, k, v = (
                t[0].index_select(1, slots).unflatten(1, (mask.shape[0], mask.shape[-1])).transpose(0, 1)
                for t in (q, k, v)
            )  # (W, H, S, D)
            out = attention(q, k, v, mask=mask).transpose(0, 1).flatten(1, 2).index_select(1, places).unsqueeze(0)
        return self.proj(out[0].transpose(0, 1).flatten(1))


class _MLP(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class _Block(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.norm2 = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = _Attention(config)
        self.mlp = _MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, windows: tuple[Tensor, Tensor, Tensor] | None) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin, windows)
        return x + self.mlp(self.norm2(x))


class _Merger(nn.Module):
    """Joins merge_size² neighbours into one embedding of the language model's width."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.width = config.hidden_size * config.merge_size**2
        self.ln_q = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = nn.Sequential(
            nn.Linear(self.width, self.width), nn.GELU(), nn.Linear(self.width, config.out_hidden_size)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.ln_q(x).view(-1, self.width))


class VisionTower(nn.Module):
    """Patches of one image -> embeddings for the language model."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = _PatchEmbed(config)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.num_layers))
        self.merger = _Merger(config)

    def forward(self, patches: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, places: Tensor, mask: Tensor) -> Tensor:
        """patches (N, patch_dim) in merge order, tables of `vision_layout` -> (N / merge², out_hidden)."""
        x = self.patch_embed(patches)
        for index, block in enumerate(self.blocks):
            whole = index in self.config.full_attention_layers
            x = block(x, cos, sin, None if whole else (slots, places, mask))
        return self.merger(x)
