"""How far a request is, on standard error: tqdm's bar where it is installed, else one line."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

from .events import Event, StepEvent, TextEvent


class Line:
    """A line that is written over at each step."""

    def __init__(self, total: int, **_: Any) -> None:
        self._done, self._total = 0, total

    def update(self, count: int) -> None:
        """Shows that more steps are done."""
        self._done += count
        sys.stderr.write(f"\rpainting: {self._done} of {self._total} steps")
        sys.stderr.flush()

    def close(self) -> None:
        """Ends the line."""
        sys.stderr.write("\n")


def step_bar(total: int) -> Any:
    """A bar over denoising steps, with `update` and `close`."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return Line(total)
    return tqdm(total=total, desc="painting", unit="step", file=sys.stderr)


def with_progress(events: Iterable[Event]) -> Iterator[Event]:
    """The events, whose words are counted and whose steps are shown as they pass."""
    bar: Any = None
    words = 0
    try:
        for event in events:
            if isinstance(event, TextEvent):
                words += len(event.text.split())
                sys.stderr.write(f"\rthinking: {words} words")
                sys.stderr.flush()
            elif isinstance(event, StepEvent):
                if event.step == 1:
                    sys.stderr.write("\n" if words else "")
                    words = 0
                    bar = step_bar(event.total)
                bar.update(1)
                if event.step == event.total:
                    bar.close()
                    bar = None
            yield event
    finally:
        if bar is not None:
            bar.close()
        elif words:
            sys.stderr.write("\n")
