"""One request at a time on one pipeline: the model's buffers are shared."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import TypeVar

from .errors import BadRequestError

E = TypeVar("E")


class Turn:
    """Requests of other threads wait for the running one. A second one of the same thread could never start, so it is
    refused: its thread is the one that should end the first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread = 0  # the one that last advanced the running request
        self._closed = False

    def during(self, events: Generator[E, None, None]) -> Generator[E, None, None]:
        """The events of a request, from whose first to whose end the turn is taken. Closing it closes the request."""
        with self._taken():
            try:
                for event in events:
                    yield event
                    self._thread = threading.get_ident()  # a generator may be advanced by several threads in turn
            finally:
                events.close()

    @contextmanager
    def last(self) -> Iterator[None]:
        """The last turn: nothing starts after it. Nothing happens where that was so already."""
        with self._taken(again=True):
            self._closed = True
            yield

    @contextmanager
    def _taken(self, again: bool = False) -> Iterator[None]:
        if not self._lock.acquire(blocking=False):
            if self._thread == threading.get_ident():
                raise BadRequestError(
                    "this thread has an unfinished request on this pipeline; read its events to the end or close them "
                    "before the next one"
                )
            self._lock.acquire()
        self._thread = threading.get_ident()
        try:
            if self._closed and not again:
                raise BadRequestError("this pipeline is closed; load the model again")
            yield
        finally:
            self._thread = 0
            self._lock.release()
