"""A running request as what the page shows of it."""

from __future__ import annotations

import html
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from PIL.Image import Image

from mindomni_rt.events import AnswerEvent, Event, GenerationResult, ImageEvent, StepEvent, TextEvent

_PAUSE = 0.05  # seconds between two updates: more are not seen, and each is a message


@dataclass(frozen=True, kw_only=True)
class View:
    """What is there so far. preview: a new one only. result: at the end."""

    status: str
    thinking: str = ""
    answer: str = ""
    preview: Image | None = None
    result: GenerationResult | None = None


def views(events: Iterator[Event]) -> Iterator[View]:
    """A view after each event, except those that follow another at once; the last one has the result."""
    view, shown = View(status=status("waiting for the device")), 0.0
    yield view
    for event in events:
        view = _after(view, event)
        now = time.monotonic()
        if view.result is not None or view.preview is not None or now - shown >= _PAUSE:
            yield view
            view, shown = replace(view, preview=None), now


def _after(view: View, event: Event) -> View:
    if isinstance(event, TextEvent):
        if event.kind == "thinking":
            return replace(view, thinking=(view.thinking + event.text).lstrip(), status=status("thinking"))
        return replace(view, answer=(view.answer + event.text).lstrip(), status=status("writing"))
    if isinstance(event, StepEvent):
        words = f"painting: step {event.step} of {event.total}"
        preview = event.preview[0] if event.preview else None
        return replace(view, preview=preview, status=status(words, event.step / event.total))
    if isinstance(event, (ImageEvent, AnswerEvent)):
        return replace(view, result=event.result, status=status(_end(event.result)))
    return view


def _end(result: GenerationResult) -> str:
    seed = "" if result.seed is None or not len(result.images) else f", seed {result.seed}"
    cut = "; the text was cut at its most new tokens" if result.finish_reason == "length" else ""
    return f"done in {result.timings['total']:.1f} s{seed}{cut}"


def status(words: str, done: float | None = None, kind: str = "status") -> str:
    """A line that a screen reader announces, with a bar where a fraction is given."""
    bar = "" if done is None else f'<progress max="1" value="{done:.3f}" aria-label="steps done"></progress>'
    words = html.escape(words[:1].upper() + words[1:])
    return f'<div class="status" role="{kind}"><span>{words}</span>{bar}</div>'
