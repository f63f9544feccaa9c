"""A step over static buffers: captured as a CUDA graph on a GPU, called as it is elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ...errors import OutOfMemoryError

WARM_UP = 1  # runs before capture: kernels compile, libraries choose


class Replay:
    """Runs `step`, which reads and writes tensors that never move and reads nothing back to the host.

    On CUDA the first call warms up, restores nothing (`step` must be repeatable), captures, and replays; the graphs of
    one `pool` share their memory. Without a graph (CPU, or capture=False) every call runs `step`.
    """

    def __init__(self, step: Callable[[], None], device: str, pool: Any = None, capture: bool = True) -> None:
        self._step, self._pool = step, pool
        self._capture = capture and device.startswith("cuda")
        self._device = device
        self._graph: torch.cuda.CUDAGraph | None = None

    def prepare(self) -> None:
        """Captures what is to be captured and is not yet. `step` runs a few times: save its state before."""
        if not self._capture or self._graph is not None:
            return
        with torch.cuda.device(self._device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    self._step()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                self._step()
            self._graph = graph

    def __call__(self) -> None:
        if self._graph is not None:
            self._graph.replay()
        else:
            self._step()


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
