"""What tensor cores do to float32 where TF32 is allowed: operands lose all but 10 bits of their mantissa."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
CONVOLUTIONS = (aten.convolution.default, aten._convolution.default, aten.conv2d.default, aten.conv3d.default)
PRODUCTS = (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.linear.default, aten.matmul.default)


def rounded(x: Tensor) -> Tensor:
    """float32 to 10 bits, nearest."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


def _operand(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dtype == torch.float32 and x.dim() > 1


class Tf32(TorchDispatchMode):
    """Rounds as a GPU of Ampere or later would by torch's switches: convolutions by default, products not."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        convolution = func in CONVOLUTIONS and torch.backends.cudnn.allow_tf32
        product = func in PRODUCTS and torch.backends.cuda.matmul.allow_tf32
        if convolution or product:
            args = [
                rounded(a) if isinstance(a, Tensor) and a.dtype == torch.float32 and a.dim() > 1 else a for a in args
            ]
        return func(*args, **(kwargs or {}))
