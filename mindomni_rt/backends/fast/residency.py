"""Which parts of a model are on the device. Weights move between stages, never inside one; modules of the part that is
needed next may arrive while other parts work, where a plan has room for them (`bring`).

Host copies stay (pinned where there is a GPU), so dropping a part costs nothing and loading it is one copy. `moved` is
called when a part moves: graphs that were captured over its weights are no longer valid.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..torch.device import copy_stream, index_of, is_cuda
from .pinned import pinned

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Arriving:
    """Device copies, by id of the tensor, of a part that is needed next. beside: parts that may work meanwhile."""

    part: str = ""
    beside: frozenset[str] = frozenset()
    copies: dict[int, Tensor] = field(default_factory=dict)


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
        self._arriving = Arriving()
        self.loads = 0
        self.moved_bytes = self.hidden_bytes = 0  # uploaded by `need`, and of them those that `bring` began
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

    def bring(self, part: str, modules: Iterable[nn.Module], beside: Iterable[str]) -> None:
        """Begins to upload some modules of a part on a stream of its own, while the parts `beside` work.

        `need` of the part takes them; `need` of any other part frees them. Without room nothing is uploaded.
        """
        if part in self.loaded or self._arriving.part:
            return
        wanted = _ids(modules)
        hosts = {id(tensor): host for tensor, host in self._host[part] if id(tensor) in wanted}
        try:
            copies = dict(zip(hosts, self._uploaded(list(hosts.values())), strict=True))
        except torch.cuda.OutOfMemoryError as error:
            logger.warning("part %s waits for its turn: %s", part, str(error).split("\n")[0])
            return
        self._arriving = Arriving(part, frozenset(beside), copies)
        logger.debug("%d tensors of part %s are on their way", len(copies), part)

    def hold(self, modules: Iterable[nn.Module]) -> None:
        """Frees what was brought unless all of it is of these modules."""
        if not _ids(modules).issuperset(self._arriving.copies):
            self._arriving = Arriving()

    def _uploaded(self, hosts: list[Tensor]) -> list[Tensor]:
        if not is_cuda(self._device):
            return [host.to(self._device, copy=True) for host in hosts]
        index = index_of(self._device)
        stream = copy_stream(index)
        copies = [torch.empty_like(host, device=self._device) for host in hosts]
        stream.wait_stream(torch.cuda.current_stream(index))  # whatever had this memory before is done
        with torch.cuda.stream(stream):
            for copy, host in zip(copies, hosts, strict=True):
                copy.copy_(host, non_blocking=True)
                copy.record_stream(stream)  # it may be freed while it arrives
        return copies

    def _arrived(self, part: str) -> dict[int, Tensor]:
        """What `bring` uploaded of a part, by the tensor's id; the device's work waits until it is there."""
        arriving, self._arriving = self._arriving, Arriving()
        if arriving.part != part:
            return {}
        if is_cuda(self._device):
            index = index_of(self._device)
            torch.cuda.current_stream(index).wait_stream(copy_stream(index))
        return arriving.copies

    def need(self, part: str) -> None:
        """Brings a part to the device, first dropping the one that is visiting: a plan never counts two."""
        if part not in (self._arriving.part, *self._arriving.beside):
            self._arriving = Arriving()
        if part == self._guest:
            return
        self.drop()
        if part in self._resident:
            return
        arrived = self._arrived(part)
        for tensor, host in self._host[part]:
            there = arrived.pop(id(tensor), None)
            self.moved_bytes += host.nbytes
            self.hidden_bytes += 0 if there is None else host.nbytes
            tensor.data = host.to(self._device, copy=True, non_blocking=True) if there is None else there
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


def _ids(modules: Iterable[nn.Module]) -> set[int]:
    return {id(tensor) for module in modules for tensor in (*module.parameters(), *module.buffers())}
