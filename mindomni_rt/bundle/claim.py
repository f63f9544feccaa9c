"""Temporary files and folders that one living process holds, so that a later one removes what dead ones left."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: what a killed process leaves stays
    fcntl = None  # type: ignore[assignment]

_DRAWN = r"[a-z0-9_]{8}(\.old)?"  # how `tempfile` ends a name


class Claim:
    """A new temporary file or folder beside others of its prefix, locked until `free` or the end of the process."""

    def __init__(self, folder: Path, prefix: str, make: Callable[[], str]) -> None:
        """make: makes it in `folder` under a name of `tempfile` with the prefix, and returns its path."""
        self._handle: int | None = None
        turn = None if fcntl is None else _lock(folder, wait=True)  # nobody takes what is new for what was left
        try:
            if turn is not None:
                _sweep(folder, prefix)
            self.path = Path(make())
            if turn is not None:
                self._handle = _lock(self.path)
        finally:
            if turn is not None:
                os.close(turn)

    def free(self) -> None:
        """Gives up the lock; the file or folder is the caller's to rename or remove."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def _sweep(folder: Path, prefix: str) -> None:
    drawn = re.compile(re.escape(prefix) + _DRAWN)
    for left in list(folder.iterdir()):
        if not drawn.fullmatch(left.name) or left.is_symlink() or not (left.is_dir() or left.is_file()):
            continue
        handle = _lock(left)
        if handle is None:
            continue
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                left.unlink()
        os.close(handle)


def _lock(path: Path, wait: bool = False) -> int | None:
    """An open handle that locks a file or folder; None where another process has it, or the system gives no locks."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle
