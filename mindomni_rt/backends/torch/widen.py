"""16-bit weights with float32 arithmetic, for CPUs without instructions for 16-bit products.

There PyTorch multiplies bfloat16 several times slower than float32, and a float32 copy of the weights takes twice the
memory. So weights stay as they are stored, mapped from the file, and each product converts a slice of its weight at a
time. Activations, norms, convolutions and the KV cache are float32, and so is the result. The exception is the language
model's decoding, token by token: its products are bound by reading the weights, and round their input and output to the
stored type.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SLICE = 1 << 24  # weights that are float32 at a time: 64 MB
FEW = 4
"""Rows up to which a product of each row by itself reads less than one conversion of the weight."""


class WideLinear(nn.Module):
    """y = x Wᵀ + b with W (out, in) in 16 bits; x and y are float32. few: rows up to which reading W is the cost."""

    def __init__(self, linear: nn.Linear, few: int = 0) -> None:
        super().__init__()
        self.weight, self.few = linear.weight, few
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.float(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out = self._few(rows) if 0 < len(rows) <= self.few else self._many(rows)
        if self.bias is not None:
            out += self.bias
        return out.unflatten(0, x.shape[:-1])

    def _few(self, x: Tensor) -> Tensor:
        narrow = x.to(self.weight.dtype)
        return torch.stack([torch.mv(self.weight, row) for row in narrow]).float()

    def _many(self, x: Tensor) -> Tensor:
        outputs, inputs = self.weight.shape
        step = max(1, min(outputs, SLICE // inputs))
        out, wide = x.new_empty(len(x), outputs), x.new_empty(step, inputs)
        for start in range(0, outputs, step):
            part = self.weight[start : start + step]
            piece = wide[: len(part)].copy_(part)
            torch.mm(x, piece.t(), out=out[:, start : start + step])
        return out


class WideEmbedding(nn.Module):
    """Rows of a 16-bit table (V, C) as float32."""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.weight = table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight).float()


def widen(model: nn.Module) -> None:
    """Replaces the linear layers and embeddings of a 16-bit model; everything else becomes float32. In place."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and child.weight.dtype != torch.float32:
                module.register_module(name, WideLinear(child))
            elif isinstance(child, nn.Embedding) and child.weight.dtype != torch.float32:
                module.register_module(name, WideEmbedding(child))
    for module in model.modules():
        if not isinstance(module, WideLinear | WideEmbedding):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.float()
