"""The language model's static KV cache."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checkpoint.config import StackConfig


class StaticCache:
    """K and V of a fixed capacity, written in place: keys, values (layers, B, Hkv, capacity, D)."""

    def __init__(
        self,
        config: StackConfig,
        capacity: int,
        batch: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (config.num_layers, batch, config.num_kv_heads, capacity, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    def write(self, layer: int, k: Tensor, v: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Stores k, v (B, Hkv, S, D) at start and returns views of all that is filled."""
        end = start + k.shape[2]
        assert end <= self.capacity, f"cache of {self.capacity} tokens, {end} needed"
        self.keys[layer, :, :, start:end] = k
        self.values[layer, :, :, start:end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]
