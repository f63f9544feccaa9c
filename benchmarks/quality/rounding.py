"""Weights and activations of a loaded pipeline rounded to fewer bits, by the plainest meaning of each precision.

Products stay in float32, so a figure shows what rounding costs and nothing else. The fast path has kernels for int8,
fp8 and int4; nvfp4 is in engines for Blackwell alone (`export`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mindomni_rt.backends.fast.backend import TorchCudaBackend
from mindomni_rt.backends.fast.linear import Linear
from mindomni_rt.kernels.int4_linear import quantize_int4
from mindomni_rt.kernels.quantize import Rows, quantize_rows_torch
from mindomni_rt.memory.precision import Precision

FP4_BLOCK = 16
Rounding = Callable[[Tensor], Tensor]


def rows(kind: str) -> Rounding:
    """int8 or e4m3 with a scale for each row: a token's activations, an output channel's weights."""
    return lambda x: quantize_rows_torch(x, kind).dequantize()


def int4_groups(weight: Tensor) -> Tensor:
    """Four bits with a scale and a minimum for each group of 128."""
    return quantize_int4(weight).dequantize()


def fp4_blocks(x: Tensor) -> Tensor:
    """e2m1 in blocks of 16, each with an e4m3 scale under one float32 scale of the whole tensor."""
    blocks = x.unflatten(-1, (-1, FP4_BLOCK))
    top = (x.abs().max() / (448.0 * 6.0)).clamp_min(1e-30)
    scale = (blocks.abs().amax(-1, keepdim=True) / 6.0 / top).clamp_max(448.0).to(torch.float8_e4m3fn).float() * top
    y = (blocks / scale.clamp_min(1e-30)).clamp(-6.0, 6.0)
    size = y.abs()  # numbers lie 1/2 apart below 2, then 1, then 2; round() takes the even one of two
    y = torch.where(size < 2, (2 * y).round() / 2, torch.where(size < 4, y.round(), 2 * (y / 2).round()))
    return (y * scale).flatten(-2)


def bfloat16(x: Tensor) -> Tensor:
    """To 8 bits of mantissa."""
    return x.bfloat16().float()


def whole(x: Tensor) -> Tensor:
    """No rounding."""
    return x


MEANINGS: dict[str, tuple[Rounding, Rounding]] = {
    "float32": (whole, whole),
    "bfloat16": (bfloat16, bfloat16),
    "int8": (rows("int8"), rows("int8")),
    "int8wo": (rows("int8"), whole),
    "fp8": (rows("fp8"), rows("fp8")),
    "int4": (int4_groups, whole),
    "nvfp4": (fp4_blocks, fp4_blocks),
}
"""Precision -> what happens to a weight (N, K) and to its input (…, K)."""


class RoundedLinear(Linear):
    """A linear layer of the fast path over rounded numbers."""

    weight: Tensor

    def __init__(self, layer: Any, kind: str) -> None:
        super().__init__(layer.bias, "torch")
        weight, self._rounded = MEANINGS[kind]
        self.register_buffer("weight", weight(layer.weight))

    def forward(self, x: Tensor | Rows) -> Tensor:
        assert isinstance(x, Tensor)
        return F.linear(self._rounded(x), self.weight, self.bias)


@contextmanager
def rounded(backend: TorchCudaBackend, precision: Precision) -> Iterator[None]:
    """The backend, loaded in float32, with the blocks and the head that `precision` names rounded."""
    owners: list[tuple[Any, str, str]] = [(backend.model.language, "lm_head", precision.head)]
    for stack, kind in ((backend.language_stack, precision.language), (backend.decoder_stack, precision.decoder)):
        owners += [(block, name, kind) for block in stack.blocks for name in ("qkv", "o", "gate_up", "down")]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in owners]
    try:
        for owner, name, kind in owners:
            setattr(owner, name, RoundedLinear(getattr(owner, name), kind))
        yield
    finally:
        for owner, name, layer in before:
            setattr(owner, name, layer)
