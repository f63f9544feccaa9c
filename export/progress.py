"""How far a build is, what is left, and where its time went."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import TypeVar

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


class Progress:
    """Steps of a build. say: receives a line after each step, for standard error; the log gets it always."""

    def __init__(self, say: Callable[[str], None] | None = None) -> None:
        self._say = say
        self._spent: defaultdict[str, float] = defaultdict(float)
        self._began = time.perf_counter()
        self._costs: dict[str, float] = {}
        self._done: list[tuple[float, float]] = []
        self._what = ""

    def start(self, what: str, costs: Mapping[str, float]) -> None:
        """Begins a phase. costs: of its steps, in any unit: the time left is judged by those already done."""
        self._what, self._costs, self._done = what, dict(costs), []
        self._count = len(costs)

    def timed(self, kind: str, work: Callable[[], Result]) -> Result:
        """Runs work and counts its time under `kind`."""
        began = time.perf_counter()
        try:
            return work()
        finally:
            self._spent[kind] += time.perf_counter() - began

    def spend(self, kind: str, seconds: float) -> None:
        """Counts time that was measured elsewhere."""
        self._spent[kind] += seconds

    def done(self, step: str, said: str, seconds: float) -> None:
        """Ends a step of the phase. seconds: 0 for one that was taken from the cache."""
        cost = self._costs.pop(step)
        if seconds:
            self._done.append((cost, seconds))
        line = f"{self._what} {self._count - len(self._costs)} of {self._count}, {step}: {said}"
        if self._costs and self._done:
            cost, spent = (sum(values) for values in zip(*self._done, strict=True))
            line += f"; about {_minutes(sum(self._costs.values()) * spent / max(cost, 1e-9))} left of this phase"
        self.tell(line)

    def tell(self, line: str) -> None:
        """A line about what begins, for whoever waits."""
        logger.info("%s", line)
        if self._say is not None:
            self._say(line)

    def summary(self) -> None:
        """Logs where the time went."""
        whole = time.perf_counter() - self._began
        rest = max(whole - sum(self._spent.values()), 0.0)
        parts = [f"{kind} {seconds:.1f} s" for kind, seconds in sorted(self._spent.items(), key=lambda item: -item[1])]
        logger.info("time: %.1f s in all; %s", whole, ", ".join([*parts, f"other {rest:.1f} s"]))


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
