"""The device that a backend works on: its index, the stream for captures, its share of memory.

A name becomes one with an index here, once: torch wants the index in places, and the current device, which a bare
"cuda" means, belongs to the thread.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, cast

import torch

P = ParamSpec("P")
R = TypeVar("R")


class OnDevice(Protocol):
    """Whatever works on a device, by name."""

    @property
    def device(self) -> str: ...


S = TypeVar("S", bound=OnDevice)


def is_cuda(device: str) -> bool:
    """Whether the name is of a CUDA device."""
    return device.split(":")[0] == "cuda"


def with_index(device: str) -> str:
    """ "cuda" as "cuda:N" of the thread's current device; other names unchanged."""
    return f"cuda:{torch.cuda.current_device()}" if device == "cuda" else device


def index_of(device: str) -> int:
    """N of "cuda:N"."""
    return int(with_index(device).partition(":")[2])


def working_on(device: str) -> AbstractContextManager[Any]:
    """Makes a CUDA device the thread's current one: Triton launches on that, whatever its tensors are on."""
    return torch.cuda.device(index_of(device)) if is_cuda(device) else nullcontext()


def on_device(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """A method during which its object's device is the thread's current one."""

    @wraps(method)
    def run(self: S, *args: P.args, **kwargs: P.kwargs) -> R:
        with working_on(self.device):
            return method(self, *args, **kwargs)

    return cast(Callable[Concatenate[S, P], R], run)


@cache
def side_stream(index: int) -> torch.cuda.Stream:
    """The one stream of a device besides its default one: cuBLAS keeps a workspace for each stream that it sees."""
    return torch.cuda.Stream(index)


@cache
def copy_stream(index: int) -> torch.cuda.Stream:
    """A device's stream for copies beside its work; nothing is computed on it."""
    return torch.cuda.Stream(index)


def mark(device: str) -> Callable[[], None]:
    """A function that waits until what is queued so far on a device has run; on a CPU it has."""
    if not is_cuda(device):
        return lambda: None
    with working_on(device):
        event = torch.cuda.Event()
        event.record()
    return event.synchronize


def limit_memory(device: str, share: float) -> None:
    """Lets this process have `share` of a CUDA device's memory, all of it with 1."""
    torch.cuda.set_per_process_memory_fraction(min(max(share, 0.0), 1.0), index_of(device))
