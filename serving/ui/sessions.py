"""What belongs to one open page: the request that it waits for, and the pictures that it was given."""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

from gradio.utils import get_upload_folder

from mindomni_rt import __version__
from mindomni_rt.events import GenerationResult


@dataclass
class _Session:
    cancels: set[threading.Event] = field(default_factory=set)
    folder: Path | None = None
    numbers: Iterator[int] = field(default_factory=lambda: count(1))


class Sessions:
    """By the name that Gradio gives a page. A page that was closed leaves nothing."""

    def __init__(self) -> None:
        folder = Path(get_upload_folder())  # files from elsewhere would be copied to it, and the copies stay a day
        folder.mkdir(parents=True, exist_ok=True)
        self._root = tempfile.TemporaryDirectory(prefix="mindomni-", dir=folder)  # removed with this object
        self._sessions: dict[str, _Session] = {}
        self._lock = threading.Lock()

    def _of(self, name: str) -> _Session:
        with self._lock:
            return self._sessions.setdefault(name, _Session())

    @contextmanager
    def running(self, name: str) -> Iterator[threading.Event]:
        """The `cancel` of a request of this page."""
        session, cancel = self._of(name), threading.Event()
        session.cancels.add(cancel)
        try:
            yield cancel
        finally:
            cancel.set()  # also where nobody asks for the next event any more
            session.cancels.discard(cancel)

    def cancel(self, name: str) -> bool:
        """Ends what the page waits for. False if that is nothing."""
        found = list(self._of(name).cancels)
        for cancel in found:
            cancel.set()
        return bool(found)

    def save(self, name: str, result: GenerationResult) -> list[str]:
        """The pictures as PNG files with their settings, for as long as the page is open."""
        session = self._of(name)
        if session.folder is None:
            session.folder = Path(tempfile.mkdtemp(dir=self._root.name))
        written = replace(result, settings={**result.settings, "mindomni_rt": __version__})
        target = session.folder / f"mindomni-{next(session.numbers):03d}-seed-{result.seed}.png"
        return [str(path) for path in written.save(target)]

    def close(self, name: str) -> None:
        """The page was closed: its requests end and its pictures are deleted."""
        self.cancel(name)
        with self._lock:
            session = self._sessions.pop(name, None)
        if session is not None and session.folder is not None:
            shutil.rmtree(session.folder, ignore_errors=True)
