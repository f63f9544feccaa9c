"""Which files of a bundle were hashed before, so that a second process starts without reading everything twice.

A file counts as checked while device, inode, size and both times of change are those of its check: writing to it, or
replacing it, changes them. The notes lie in $XDG_CACHE_HOME/mindomni-rt/checked; without them everything is hashed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from pathlib import Path
from typing import Any

from ..files import cache_folder, parse_json, read_bytes, write_text

_MOST_BYTES = 2**24
_SETTLED = 2_000_000_000  # nanoseconds


class Checked:
    """The notes on one bundle's folder."""

    def __init__(self, folder: Path) -> None:
        name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:32]
        self._note = cache_folder() / "checked" / f"{name}.json"
        self._folder, self._found = folder, dict[str, Any]()
        with contextlib.suppress(OSError, ValueError):
            found = parse_json(read_bytes(self._note, _MOST_BYTES))
            self._found = found if isinstance(found, dict) else {}
        self._new: dict[str, list[Any]] = {}

    def has(self, name: str, sha256: str) -> bool:
        """Whether a file was found to have this hash and has not changed since."""
        return self._found.get(name) == self._state(name, sha256)

    def add(self, name: str, sha256: str) -> None:
        """Notes that a file has this hash. One that changed just now is not noted: a clock's tick may hide a change."""
        state = self._state(name, sha256)
        if time.time_ns() - max(state[-2:]) > _SETTLED:
            self._new[name] = state

    def save(self) -> None:
        """Keeps the notes; where they cannot be written, the next process hashes again."""
        if not self._new:
            return
        with contextlib.suppress(OSError):
            self._note.parent.mkdir(parents=True, exist_ok=True)
            write_text(self._note, json.dumps({**self._found, **self._new}))

    def _state(self, name: str, sha256: str) -> list[Any]:
        found = (self._folder / name).stat()
        return [sha256, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]
