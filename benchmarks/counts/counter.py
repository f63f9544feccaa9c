"""What PyTorch does, counted instead of timed: floating-point operations, operators, bytes that they allocate."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


class Counter(TorchDispatchMode):
    """Counts operators as they are dispatched, and the memory behind what they return.

    operators: calls of any operator. bytes: of new storages, views and in-place results left out. peak: the most of
    them alive at once. Memory that an operator uses inside is not seen; neither is what numpy holds.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators = self.bytes = self.peak = self._live = 0
        self.by_name: dict[str, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = {_address(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        self.operators += 1
        self.by_name[str(func)] = self.by_name.get(str(func), 0) + 1
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (place := _address(tensor)) not in given:
                given.add(place)
                self._made(tensor.untyped_storage())
        return out

    def _made(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self.bytes += size
        self._live += size
        self.peak = max(self.peak, self._live)
        weakref.finalize(storage, self._gone, size).atexit = False

    def _gone(self, size: int) -> None:
        self._live -= size


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@contextmanager
def counting() -> Iterator[Counter]:
    """Counts a block. Reference counts alone free memory in it, so that the peak is the same in every run."""
    gc.collect()
    gc.disable()
    try:
        with Counter() as counter:
            yield counter
    finally:
        gc.enable()


@contextmanager
def counting_flops() -> Iterator[FlopCounterMode]:
    """Two for each multiply-add of products, convolutions and attention; masked pairs of attention count too."""
    # The counter does not know the CPU's fused attention; the plain one is made of products that it knows.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        yield counter
