"""Seconds that a request spends in each stage."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from .backends.base import Backend


class Clock:
    """Seconds by stage, the device's work included. What the caller does with an event is not counted."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._began = time.perf_counter()
        self._seconds: dict[str, float] = {}
        self._idle = 0.0

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        began, idle = time.perf_counter(), self._idle
        try:
            yield
        finally:
            self._backend.synchronize()
            spent = time.perf_counter() - began - (self._idle - idle)
            self._seconds[stage] = self._seconds.get(stage, 0.0) + spent

    @contextmanager
    def paused(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self._idle += time.perf_counter() - began

    def mark(self, name: str) -> None:
        """Seconds since the request began, the first time only."""
        self._seconds.setdefault(name, time.perf_counter() - self._began - self._idle)

    def report(self) -> dict[str, float]:
        self._backend.synchronize()
        return {**self._seconds, "total": time.perf_counter() - self._began - self._idle}
