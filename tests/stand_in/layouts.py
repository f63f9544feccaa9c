"""Layouts of tensors: which operations turn NCHW into NHWC or back, those that cuDNN makes by itself included.

A build of torch without cuDNN gives convolutions NCHW. On a GPU both operands and the output take NHWC as soon as one
operand has it (`cudnn_conv_suggest_memory_format`); an operand that has not is copied first.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
CONVOLUTION = aten.convolution.default
COPIES = (aten.clone.default, aten._to_copy.default, aten.copy_.default)


def order(x: Tensor) -> list[int]:
    """Axes from the slowest to the fastest; those of one place are in any order."""
    return sorted((i for i, size in enumerate(x.shape) if size > 1), key=lambda i: -x.stride(i))


class Layouts:
    """Counts by phase of the request: convolutions, their operands copied, other copies that change the layout."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()

    def after(self, func: Any, args: Any, found: Any, phase: str) -> Any:
        """The operation's result, laid out as a GPU's would be."""
        if func is CONVOLUTION and found.is_cuda and found.dim() == 4:
            return self._convolution(args[0], args[1], found, phase)
        if func in COPIES and isinstance(found, Tensor) and found.is_cuda and isinstance(args[0], Tensor):
            source = args[1] if func is aten.copy_.default else args[0]
            if isinstance(source, Tensor) and source.shape == found.shape and order(source) != order(found):
                self.seen[f"{phase} copies"] += 1
        return found

    def _convolution(self, x: Tensor, weight: Tensor, found: Tensor, phase: str) -> Tensor:
        self.seen[f"{phase} convolutions"] += 1
        operands = (x, weight)
        last = any(t.stride(1) == 1 and not t.is_contiguous() for t in operands)
        layout = torch.channels_last if last else torch.contiguous_format
        copied = sum(not t.is_contiguous(memory_format=layout) for t in operands)
        if copied:
            self.seen[f"{phase} operands"] += copied
        return found.contiguous(memory_format=layout)
