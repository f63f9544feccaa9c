"""Quantization to 4 bits takes 100,000 operations on fake tensors: one group of rows of each shape stands for all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mindomni_rt.kernels import int4_linear


@contextmanager
def remembered() -> Iterator[None]:
    """`int4_linear._pack` runs once for each shape, device and type; then its results are made empty."""
    real, known = int4_linear._pack, dict[Any, list[tuple[Any, ...]]]()

    def pack(groups: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
        key = (tuple(groups.shape), groups.device, groups.dtype, *rest)
        if key not in known:
            found = real(groups, *rest)
            known[key] = [(tuple(t.shape), t.dtype) for t in found]
            return found
        return tuple(torch.empty(shape, dtype=dtype, device=groups.device) for shape, dtype in known[key])

    int4_linear._pack = pack  # type: ignore[assignment]
    try:
        yield
    finally:
        int4_linear._pack = real
