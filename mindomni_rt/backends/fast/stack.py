"""A stack of transformer blocks as the fast path runs it: the same arithmetic in fewer passes over memory.

Four products a block; between them one kernel each: norm with the residual, rotary embedding in place (or into a
cache), attention, gate. Weights move here from the `Block`s, which are left empty, so nothing is kept twice.

Axes: B batch, S tokens, C hidden, Hq and Hkv heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import cast

import torch
from torch import Tensor, nn

from mindomni_rt.kernels.norm_gemv import norm_gemv
from mindomni_rt.kernels.norms import add_norm
from mindomni_rt.kernels.quantize import Rows
from mindomni_rt.kernels.rope import rope
from mindomni_rt.kernels.swiglu import swiglu

from ...checkpoint.config import StackConfig
from ...model.block import Block
from .linear import Product, make_product

Rotate = Callable[[int, Tensor], tuple[Tensor, Tensor, Tensor]]
"""(layer, projection (B, S, (Hq + 2 Hkv) D)) -> q, k, v, rotated."""
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q, k, v) -> (B, Hq, S, D)."""


class FastBlock(nn.Module):
    """One block's weights as products."""

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
        self.qkv = make_product(qkv.detach(), None if bias is None else bias.detach(), stored, impl, work)
        self.o = make_product(attention.o_proj.weight.detach(), None, stored, impl, work)
        self.gate_up = make_product(gate_up.detach(), None, stored, impl, work)
        self.down = make_product(mlp.down_proj.weight.detach(), None, stored, impl, work)

    def products(self) -> tuple[Product, ...]:
        return self.qkv, self.o, self.gate_up, self.down


class FastStack(nn.Module):
    """The blocks of one stack. `stored` says how the products keep their weights, `impl` which kernels run.

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
        self.fused_rows = False  # norm, product and gate of one row as one kernel; `torch_tune` measures
        fast = []
        for block in blocks:
            assert isinstance(block, Block)
            made = FastBlock(block, stored, impl, work)
            fast.append(made.to(home) if home else made)
            block.to("meta")  # its weights live on in the products
        self.blocks = nn.ModuleList(fast)

    def forward(self, x: Tensor, rotate: Rotate, attend: Attend, first: int = 0, last: int | None = None) -> Tensor:
        """x (B, S, C) through blocks first…last-1 (all of them) -> (B, S, C)."""
        pending, stream = x, None
        fused = self.fused_rows and x.numel() == x.shape[-1]
        for layer in range(first, len(self.blocks) if last is None else last):
            block = cast(FastBlock, self.blocks[layer])
            qkv, stream = self._normed(block.qkv, pending, block.norm1, block.eps, stream, fused)
            q, k, v = rotate(layer, qkv)
            attended = attend(layer, q, k, v).transpose(1, 2).flatten(2)
            inner, stream = self._gated(block, block.o(attended), stream, fused)
            pending = block.down(inner)
        return pending if stream is None else pending + stream

    def _normed(
        self, product: Product, x: Tensor, norm: Tensor, eps: float, stream: Tensor | None, fused: bool
    ) -> tuple[Tensor, Tensor]:
        """(product of norm(x + stream), x + stream)."""
        weight = product.row_weight() if fused else None
        if weight is not None:
            return norm_gemv(x, weight, norm, eps, stream, product.bias, impl=self.impl)
        normed, total = add_norm(x, norm, eps, stream, product.rows, impl=self.impl)
        return product(normed), total

    def _gated(self, block: FastBlock, x: Tensor, stream: Tensor | None, fused: bool) -> tuple[Tensor | Rows, Tensor]:
        """(what `down` takes, x + stream)."""
        weight = block.gate_up.row_weight() if fused else None
        if weight is not None:
            return norm_gemv(x, weight, block.norm2, block.eps, stream, gate=True, impl=self.impl)
        both, total = self._normed(block.gate_up, x, block.norm2, block.eps, stream, False)
        return swiglu(both, block.down.rows, impl=self.impl), total

    def keys_values(self, layer: int, x: Tensor, rotate: Rotate) -> tuple[Tensor, Tensor]:
        """K and V of one block's input: all that the last block of a prefix pass is needed for."""
        block = cast(FastBlock, self.blocks[layer])
        normed: Tensor | Rows
        normed, _ = add_norm(x, block.norm1, block.eps, None, block.qkv.rows, impl=self.impl)
        _, k, v = rotate(layer, block.qkv(normed))
        return k, v

    def in_place(self, cos: Tensor, sin: Tensor) -> Rotate:
        """Rotation by tables (S, D/2) or (B, S, D/2) without a cache."""
        heads, kv_heads = self.config.num_heads, self.config.num_kv_heads
        return lambda _, x: rope(x, cos, sin, heads, kv_heads, impl=self.impl)

    def into_cache(self, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, start: Tensor) -> Rotate:
        """Rotation and storing in keys, values (layers, B, Hkv, C, D) from slot `start` (int32 (1,)) on."""
        heads, kv_heads = self.config.num_heads, self.config.num_kv_heads
        return lambda layer, x: rope(x, cos, sin, heads, kv_heads, (keys[layer], values[layer]), start, impl=self.impl)
