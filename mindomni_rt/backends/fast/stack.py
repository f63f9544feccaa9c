"""`BlockStack` as the fast path runs it: the same call and the same arithmetic in fewer passes over memory.

Four linear layers a block; between them one kernel each: norm with the residual, rotary embedding in place (or into a
cache), attention, gate. Weights move here from the `Block`s, which are left empty, so nothing is stored twice.

Axes: B batch, S tokens, C hidden, Hq and Hkv heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from mindomni_rt.kernels.norm_gemv import norm_gemv
from mindomni_rt.kernels.norms import add_norm
from mindomni_rt.kernels.quantize import Rows
from mindomni_rt.kernels.rope import rope
from mindomni_rt.kernels.swiglu import swiglu

from ...checkpoint.config import StackConfig
from ...model.attention import LayerAttend
from ...model.block import Block
from .linear import Linear, make_linear


@dataclass(frozen=True)
class CacheSlot:
    """Where a step's K and V go: keys, values (layers, B, Hkv, capacity, D) from slot `start`, int32 (1,), on."""

    keys: Tensor
    values: Tensor
    start: Tensor


class FastBlock(nn.Module):
    """One block's linear layers and norms."""

    norm1: Tensor
    norm2: Tensor

    def __init__(self, block: Block, stored: str, impl: str, work: str | None) -> None:
        super().__init__()
        attention, mlp = block.self_attn, block.mlp
        if block.self_attn.config.fused:
            qkv: Tensor = attention.qkv_proj.weight
            bias: Tensor | None = attention.qkv_proj.bias
            gate_up: Tensor = mlp.gate_up_proj.weight
        else:
            three = (attention.q_proj, attention.k_proj, attention.v_proj)
            qkv = torch.cat([p.weight for p in three])
            bias = torch.cat([p.bias for p in three]) if attention.config.qkv_bias else None
            gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
        self.eps = block.input_layernorm.eps
        self.register_buffer("norm1", block.input_layernorm.weight.detach())
        self.register_buffer("norm2", block.post_attention_layernorm.weight.detach())
        self.qkv = make_linear(qkv.detach(), None if bias is None else bias.detach(), stored, impl, work)
        self.o = make_linear(attention.o_proj.weight.detach(), None, stored, impl, work)
        self.gate_up = make_linear(gate_up.detach(), None, stored, impl, work)
        self.down = make_linear(mlp.down_proj.weight.detach(), None, stored, impl, work)

    def linears(self) -> tuple[Linear, ...]:
        """All four."""
        return self.qkv, self.o, self.gate_up, self.down


class FastStack(nn.Module):
    """The blocks of one stack. stored: the format of the weights; impl: which kernels run.

    work: where to quantize; home: where each block goes once it is made, None to stay where its weights were.
    """

    def __init__(
        self,
        config: StackConfig,
        blocks: Iterable[nn.Module],
        stored: str,
        impl: str = "auto",
        work: str | None = None,
        home: str | None = None,
    ) -> None:
        super().__init__()
        self.config, self.impl, self.stored = config, impl, stored
        self.fused_rows = False  # norm, linear layer and gate of one row as one kernel; `tune` measures
        fast = []
        for block in blocks:
            assert isinstance(block, Block)
            made = FastBlock(block, stored, impl, work)
            fast.append(made.to(home) if home else made)
            block.to("meta")  # the linear layers hold its weights now
        self.blocks = nn.ModuleList(fast)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        attend: LayerAttend,
        first: int = 0,
        last: int | None = None,
        cache: CacheSlot | None = None,
    ) -> Tensor:
        """As `BlockStack`: x (B, S, C) through blocks first…last-1 -> (B, S, C).

        Tables (S, D/2) or (B, S, D/2). With a cache, they are (capacity, D/2), K and V of the new tokens go to their
        slots while they are rotated, and `attend` gets the whole cache of its layer.
        """
        pending, stream = x, None
        fused = self.fused_rows and x.numel() == x.shape[-1]
        for layer in range(first, len(self.blocks) if last is None else last):
            block = cast(FastBlock, self.blocks[layer])
            # One name for what a half of the block takes and gives: the other tensors go before the next half's come.
            pending, stream = self._attended(layer, block, pending, stream, (cos, sin), attend, cache, fused)
            inner, stream = self.gated(block, pending, stream, fused)
            pending = block.down(inner)
            del inner
        return pending if stream is None else pending + stream

    def _attended(
        self,
        layer: int,
        block: FastBlock,
        x: Tensor,
        stream: Tensor | None,
        tables: tuple[Tensor, Tensor],
        attend: LayerAttend,
        cache: CacheSlot | None,
        fused: bool,
    ) -> tuple[Tensor, Tensor]:
        """(the attention's output after `o`, x + stream)."""
        qkv, total = self.normed(block.qkv, x, block.norm1, block.eps, stream, fused)
        q, k, v = self._rotated(layer, qkv, *tables, cache)
        attended = attend(layer, q, k, v).transpose(1, 2).flatten(2)
        return block.o(attended), total

    def _rotated(
        self, layer: int, qkv: Tensor, cos: Tensor, sin: Tensor, cache: CacheSlot | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        heads, kv_heads = self.config.num_heads, self.config.num_kv_heads
        if cache is None:
            return rope(qkv, cos, sin, heads, kv_heads, impl=self.impl)
        place = (cache.keys[layer], cache.values[layer])
        return rope(qkv, cos, sin, heads, kv_heads, place, cache.start, impl=self.impl)

    def normed(
        self, linear: Linear, x: Tensor, norm: Tensor, eps: float, stream: Tensor | None, fused: bool
    ) -> tuple[Tensor, Tensor]:
        """(linear(norm(x + stream)), x + stream). fused: one kernel for a single row, where the weight has one."""
        weight = linear.row_weight() if fused else None
        if weight is not None:
            return norm_gemv(x, weight, norm, eps, stream, linear.bias, impl=self.impl)
        normed, total = add_norm(x, norm, eps, stream, linear.rows, impl=self.impl)
        return linear(normed), total

    def gated(self, block: FastBlock, x: Tensor, stream: Tensor | None, fused: bool) -> tuple[Tensor | Rows, Tensor]:
        """(the input of `down`, x + stream)."""
        weight = block.gate_up.row_weight() if fused else None
        if weight is not None:
            return norm_gemv(x, weight, block.norm2, block.eps, stream, gate=True, impl=self.impl)
        both, total = self.normed(block.gate_up, x, block.norm2, block.eps, stream, False)
        return swiglu(both, block.down.rows, impl=self.impl), total

    def keys_values(self, layer: int, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """As `BlockStack`: K and V of one block's input."""
        block = cast(FastBlock, self.blocks[layer])
        normed: Tensor | Rows
        normed, _ = add_norm(x, block.norm1, block.eps, None, block.qkv.rows, impl=self.impl)
        _, k, v = self._rotated(layer, block.qkv(normed), cos, sin)
        return k, v
