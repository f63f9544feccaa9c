"""When to record a step as a CUDA graph and when to replay it. No CUDA in here: the decisions alone."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from enum import Enum
from typing import Generic, TypeVar

Graph = TypeVar("Graph")
STAGED_BYTES = (
    1 << 20
)  # arrays up to here are copied to a fixed place: a few microseconds, for a graph that fits always
_GRAPHS = 16  # kept for one engine
_SEEN = 64


class Action(Enum):
    """What to do with a call."""

    RUN = "run"
    CAPTURE = "capture"
    REPLAY = "replay"


def staged(nbytes: int) -> bool:
    """Whether an array passes through staging memory instead of being bound where it lies."""
    return nbytes <= STAGED_BYTES


class Captures(Generic[Graph]):
    """Recorded graphs by call: (name, address, shape) of all its tensors.

    The first call of a kind runs plainly, since a prefill never comes again; the second is recorded; the others are
    replayed. The least recently used graph makes room.
    """

    def __init__(self, limit: int = _GRAPHS) -> None:
        assert limit > 0
        self._limit = limit
        self._graphs: OrderedDict[Hashable, Graph] = OrderedDict()
        self._seen: OrderedDict[Hashable, None] = OrderedDict()

    def next(self, key: Hashable) -> Action:
        """What to do with this call."""
        if key in self._graphs:
            self._graphs.move_to_end(key)
            return Action.REPLAY
        if key in self._seen:
            return Action.CAPTURE
        self._seen[key] = None
        if len(self._seen) > _SEEN:
            self._seen.popitem(last=False)
        return Action.RUN

    def put(self, key: Hashable, graph: Graph) -> None:
        """Keeps a recorded graph."""
        self._graphs[key] = graph
        self._seen.pop(key, None)
        if len(self._graphs) > self._limit:
            self._graphs.popitem(last=False)

    def get(self, key: Hashable) -> Graph:
        """The graph to replay."""
        return self._graphs[key]
