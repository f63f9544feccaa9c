"""The one transformer block: language model, connector and diffusion decoder are stacks of it.

Axes: B batch, S tokens, C hidden, H heads, D head_dim. Submodules carry the published tensor names.
"""

from __future__ import annotations

from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checkpoint.config import StackConfig
from .attention import Attend, LayerAttend


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates x (B, H, S, D) by tables (S, D/2) or (B, S, D/2), pairing channel i with i + D/2."""
    if torch.onnx.is_in_onnx_export():
        return _rope_onnx(x, cos, sin)
    cos, sin = cos.unsqueeze(-3).to(x.dtype), sin.unsqueeze(-3).to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _rope_onnx(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same as one ONNX RotaryEmbedding, which TensorRT knows as a layer of its own."""
    tables = [
        t.to(x.dtype) if t.ndim == 3 else t.to(x.dtype).unsqueeze(0).expand(x.shape[0], -1, -1) for t in (cos, sin)
    ]
    return torch.onnx.ops.rotary_embedding(x, *tables)


class Attention(nn.Module):
    """Projections and RoPE; who may see whom is the caller's `attend`."""

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.config = config
        hidden, head = config.hidden_size, config.head_dim
        self.q_size, self.kv_size = config.num_heads * head, config.num_kv_heads * head
        if config.fused:
            self.qkv_proj = nn.Linear(hidden, self.q_size + 2 * self.kv_size, bias=config.qkv_bias)
        else:
            self.q_proj = nn.Linear(hidden, self.q_size, bias=config.qkv_bias)
            self.k_proj = nn.Linear(hidden, self.kv_size, bias=config.qkv_bias)
            self.v_proj = nn.Linear(hidden, self.kv_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(self.q_size, hidden, bias=False)

    def qkv(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, S, C) -> q (B, Hq, S, D), k and v (B, Hkv, S, D); q and k rotated."""
        if self.config.fused:
            q, k, v = self.qkv_proj(x).split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        else:
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = (t.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2) for t in (q, k, v))
        return apply_rope(q, cos, sin), apply_rope(k, cos, sin), v

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        return self.o_proj(attend(*self.qkv(x, cos, sin)).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.fused = config.fused
        if config.fused:
            self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        else:
            self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
            self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1) if self.fused else (self.gate_proj(x), self.up_proj(x))
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    """Pre-norm attention and MLP, each with a residual."""

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def keys_values(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Only this block's K and V of x: all that the last layer of a prefix pass is needed for."""
        _, k, v = self.self_attn.qkv(self.input_layernorm(x), cos, sin)
        return k, v

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """x (B, S, C), tables (S, D/2) or (B, S, D/2) -> (B, S, C)."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class BlockStack(nn.ModuleList):
    """Blocks in order. The fast path puts its own stack in this one's place; both are called alike."""

    def __init__(self, config: StackConfig) -> None:
        super().__init__(Block(config) for _ in range(config.num_layers))

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, attend: LayerAttend, first: int = 0, last: int | None = None
    ) -> Tensor:
        """x (B, S, C) through blocks first…last-1 (all of them) -> (B, S, C)."""
        for layer in range(first, len(self) if last is None else last):
            x = self[layer](x, cos, sin, partial(attend, layer))
        return x

    def keys_values(self, layer: int, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """K and V of one block's input x."""
        return cast(Block, self[layer]).keys_values(x, cos, sin)
