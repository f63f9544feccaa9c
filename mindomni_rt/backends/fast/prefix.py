"""A branch's prefix, which waits in host memory between requests: the step's buffers hold a copy of their own."""

from __future__ import annotations

from dataclasses import fields

from torch import Tensor

from ...model.decoder import PrefixKV
from ..torch.backend import TorchPrefix
from .pinned import pinned


class FastPrefix(TorchPrefix):
    """`TorchPrefix` that can leave the device. Only the parts that a step reads return to it (`at_times`)."""

    def to_host(self) -> None:
        """Moves everything to pinned memory; on a CPU it is there."""
        if not self.kv.keys.is_cuda:
            return
        names = [f.name for f in fields(PrefixKV)]
        tensors = [*(getattr(self.kv, name) for name in names), self.modulation]
        hosts = {id(tensor): host for tensor, host in pinned(tensors)}
        *kv, self.modulation = (hosts[id(tensor)] for tensor in tensors)
        self.kv = PrefixKV(**dict(zip(names, kv, strict=True)))

    def at_times(self, device: str) -> tuple[Tensor, Tensor, Tensor]:
        """(keys, values of the time tokens, modulation) on the device."""
        found = (self.kv.time_keys, self.kv.time_values, self.modulation)
        return tuple(t.to(device, non_blocking=True) for t in found)  # type: ignore[return-value]
