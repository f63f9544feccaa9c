"""Records of whole optimizer steps: read together, handed out as micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..data.record import Record, Stream


class StepReader:
    """A stream that reads the records of a step at once, so that means can be taken over all of them.

    size: records of a step. begin: called with them before the first is handed out. The position that it stores is
    that of the stream behind it: at the end of a step, where checkpoints are made, nothing is held back.
    """

    def __init__(self, stream: Stream, size: int, begin: Callable[[Sequence[Record]], None]) -> None:
        self._stream, self._size, self._begin = stream, size, begin
        self._held: list[Record] = []

    def next_batch(self, count: int) -> list[Record]:
        """The next records of the step; those of the next step where this one is used up."""
        if not self._held:
            self._held = list(self._stream.next_batch(self._size))
            self._begin(self._held)
        batch, self._held = self._held[:count], self._held[count:]
        return batch

    def state_dict(self) -> Any:
        """The position of the stream behind."""
        return self._stream.state_dict()

    def load_state_dict(self, state: Any) -> None:
        """Continues from a position, at the start of a step."""
        self._held = []
        self._stream.load_state_dict(state)
