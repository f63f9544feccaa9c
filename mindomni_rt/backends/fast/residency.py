"""Which parts of a model are on the device. Weights move between stages, never inside one.

Host copies stay (pinned where there is a GPU), so dropping a part costs nothing and loading it is one copy. `moved` is
called when a part moves: graphs that were captured over its weights are no longer valid.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from ..torch.device import is_cuda
from .pinned import pinned

logger = logging.getLogger(__name__)


class Residency:
    """Parts by name, each a few modules. `resident` ones stay; of the others one is loaded at a time."""

    def __init__(
        self,
        parts: Mapping[str, Iterable[nn.Module]],
        device: str,
        resident: Iterable[str],
        moved: Callable[[str], None] = lambda part: None,
    ) -> None:
        self._device, self._moved = device, moved
        self._parts = {name: list(modules) for name, modules in parts.items()}
        self._resident = frozenset(resident)
        # Quantized weights are made on the device; whatever is not to stay there goes to the host first.
        self._host: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._guest = ""
        self.loads = 0
        for name in self._parts:
            if name in self._resident:
                for tensor in self._tensors(name):
                    tensor.data = tensor.data.to(device)
            else:
                self._host[name] = []
                for tensor, host in self._copies(self._tensors(name)):
                    tensor.data = host
                    self._host[name].append((tensor, host))

    def _tensors(self, name: str) -> list[Tensor]:
        found: dict[int, Tensor] = {}
        for module in self._parts[name]:
            for tensor in (*module.parameters(), *module.buffers()):
                found[id(tensor)] = tensor
        return [t for t in found.values() if not t.is_meta]

    def _copies(self, tensors: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """(tensor, its copy on the host)."""
        if is_cuda(self._device) and torch.cuda.is_available():
            return pinned(tensors)
        return ((tensor, tensor.detach().to("cpu")) for tensor in tensors)

    @property
    def loaded(self) -> frozenset[str]:
        """Parts that are on the device now."""
        return self._resident | ({self._guest} if self._guest else frozenset())

    def need(self, part: str) -> None:
        """Brings a part to the device, first dropping the one that is visiting: a plan never counts two."""
        if part == self._guest:
            return
        self.drop()
        if part in self._resident:
            return
        for tensor, host in self._host[part]:
            tensor.data = host.to(self._device, copy=True, non_blocking=True)
        self._guest = part
        self.loads += 1
        self._moved(part)
        logger.debug("part %s loaded", part)

    def drop(self) -> None:
        """Sends the visiting part away."""
        if not self._guest:
            return
        self._moved(self._guest)
        for tensor, host in self._host[self._guest]:
            tensor.data = host
        self._guest = ""
