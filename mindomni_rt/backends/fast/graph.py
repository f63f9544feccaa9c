"""A step over static buffers: captured as a CUDA graph on a GPU, called as it is elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from weakref import WeakSet

import torch

from ...errors import OutOfMemoryError
from ..torch.device import index_of, is_cuda, side_stream

WARM_UP = 1  # runs before capture: kernels compile, libraries choose, refusals show


class GraphPool:
    """Memory that the graphs of one backend share.

    Without a live graph the next capture begins a new pool: torch refuses a capture into one that no graph uses.
    capture: False where steps ask the device for values, as reference implementations of kernels do.
    """

    def __init__(self, capture: bool = True) -> None:
        self.capture = capture
        self._handle: Any = None
        self._users: WeakSet[Replay] = WeakSet()

    def handle(self, user: Replay) -> Any:
        """The handle for a capture of `user`, which counts as a user from here on."""
        if not self._users:
            self._handle = torch.cuda.graph_pool_handle()
        self._users.add(user)
        return self._handle

    def leave(self, user: Replay) -> None:
        """The capture of `user` failed."""
        self._users.discard(user)


class Replay:
    """Runs `step`, which reads and writes tensors that never move and reads nothing back to the host.

    On CUDA the first call warms up, restores nothing (`step` must be repeatable), captures, and replays; the graphs of
    one `pool` share their memory. Without a graph (CPU, or capture=False) every call runs `step`. warm: it ran before.
    """

    def __init__(
        self,
        step: Callable[[], None],
        device: str,
        pool: GraphPool | None = None,
        capture: bool = True,
        warm: bool = False,
    ) -> None:
        self.step, self._pool = step, pool or GraphPool()
        self._capture, self._warm = capture and self._pool.capture and is_cuda(device), warm
        self._device = device
        self._graph: torch.cuda.CUDAGraph | None = None

    def prepare(self) -> None:
        """Captures what is to be captured and is not yet. `step` runs a few times: save its state before."""
        if not self._capture or self._graph is not None:
            return
        try:
            self._graph = captured(self.step, index_of(self._device), self._pool.handle(self), self._warm)
        except BaseException:
            self._pool.leave(self)
            raise

    def __call__(self) -> None:
        if self._graph is not None:
            self._graph.replay()
        else:
            self.step()


def captured(step: Callable[[], object], index: int, pool: Any = None, warm: bool = False) -> torch.cuda.CUDAGraph:
    """`step` as a graph of device `index`, after a run outside of it unless `warm`. An error leaves no capture open."""
    pool = pool or torch.cuda.graph_pool_handle()
    with torch.cuda.device(index):
        stream, before = side_stream(index), torch.cuda.current_stream()
        stream.wait_stream(before)
        # A capture that fails to end leaves its stream the current one, so the stream is set around it too.
        with torch.cuda.stream(stream):
            for _ in range(0 if warm else WARM_UP):
                step()
            before.wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, pool=pool, stream=stream):
                    step()
            except BaseException:
                _end_allocation(index, pool)
                raise
    return graph


def _end_allocation(index: int, pool: Any) -> None:
    """After a failed capture, which the allocator goes on serving in torch up to 2.11; later ones refuse the call."""
    with suppress(RuntimeError):
        torch._C._cuda_endAllocateToPool(index, pool)


@contextmanager
def memory_of(stage: str) -> Iterator[None]:
    """Turns a device's refusal of memory into OutOfMemoryError with what to do."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise OutOfMemoryError(
            f"no memory left in stage {stage}: {str(error).splitlines()[0]} "
            "Load with a memory_budget or a smaller precision, or choose a smaller image or fewer images at once"
        ) from error
