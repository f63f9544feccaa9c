"""One request at a time on one pipeline: the model's buffers are shared."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import TypeVar

from .errors import BadRequestError, GenerationCancelled

E = TypeVar("E")
_LOOK = 0.05  # seconds between looks at whether a waiting request was cancelled


class Turn:
    """Requests of other threads wait for the running one. A second one of the same thread could never start, so it is
    refused: its thread is the one that should end the first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread = 0  # the one that last advanced the running request
        self._closed = False

    def during(
        self, events: Generator[E, None, None], cancel: threading.Event | None = None
    ) -> Generator[E, None, None]:
        """The events of a request, from whose first to whose end the turn is taken. Closing it closes the request.

        Setting `cancel` ends the waiting with GenerationCancelled.
        """
        with self._taken(cancel=cancel):
            try:
                for event in events:
                    yield event
                    self._thread = threading.get_ident()  # a generator may be advanced by several threads in turn
            finally:
                events.close()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """A turn without a request: nothing runs meanwhile."""
        with self._taken():
            yield

    @contextmanager
    def last(self) -> Iterator[None]:
        """The last turn: nothing starts after it. Nothing happens where that was so already."""
        with self._taken(again=True):
            self._closed = True
            yield

    @contextmanager
    def _taken(self, again: bool = False, cancel: threading.Event | None = None) -> Iterator[None]:
        if not self._lock.acquire(blocking=False):
            if self._thread == threading.get_ident():
                raise BadRequestError(
                    "this thread has an unfinished request on this pipeline; read its events to the end or close them "
                    "before the next one"
                )
            self._wait(cancel)
        self._thread = threading.get_ident()
        try:
            if self._closed and not again:
                raise BadRequestError("this pipeline is closed; load the model again")
            yield
        finally:
            self._thread = 0
            self._lock.release()

    def _wait(self, cancel: threading.Event | None) -> None:
        while not self._lock.acquire(timeout=_LOOK if cancel is not None else -1):
            if cancel is not None and cancel.is_set():
                raise GenerationCancelled("cancelled by the caller")
