"""Writing and reading files: a name holds the whole new content or the old one, and special files are never read."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

MOST_TEXT = 2**28
"""Bytes of a configuration, record or log that a user names."""


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/mindomni-rt, or the same in ~/.cache; without a home in the folder for temporary files."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        cache = Path(base) if base else Path.home() / ".cache"
    except RuntimeError:  # no HOME and no such user
        cache = Path(tempfile.gettempdir())
    return cache / "mindomni-rt"


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file under a unique temporary name in the same folder, then renames it to `path`.

    write receives the temporary path. Readers see the old file or the whole new one, also when several processes write
    the same name or the disk is full. Raises OSError that names `path`, and whatever `write` raises; the temporary file
    is removed then.
    """
    temporary = path.with_name(f".{path.name[:50]}.{secrets.token_hex(8)}.partial")
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.filename in (None, temporary, str(temporary)):  # a write that fails names no file
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def try_file(path: Path) -> None:
    """Makes and removes a file beside `path`, or in the nearest folder above it that exists, before work whose result
    goes there. Raises OSError that names `path`, ValueError for a NUL in it."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    trial = folder / f".{secrets.token_hex(8)}.partial"
    try:
        with contextlib.suppress(FileNotFoundError):
            path.lstat()  # raises for a name that no file can have
        trial.touch(exist_ok=False)
        trial.unlink()
    except OSError as error:
        error.filename = str(path)
        raise


def write_text(path: Path, text: str) -> None:
    """`replace_file` with UTF-8 text."""
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8", newline="\n"))


def write_whole(path: Path, data: bytes) -> None:
    """`replace_file` with bytes; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda temporary: temporary.write_bytes(data))


def why(error: BaseException) -> str:
    """What the system says about a file, without the error's number and the path, which the caller names."""
    return getattr(error, "strerror", None) or str(error)


def require_regular(path: Path) -> int:
    """The size in bytes of a regular file. Raises OSError for a folder, FIFO, device, socket or a missing file, and for
    a name that no file can have."""
    try:
        found = path.stat()
    except ValueError as error:
        raise OSError(errno.EINVAL, f"no file can have this name: {error}") from error
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, "is a folder, expected a file")
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "is a pipe, device or socket, expected a regular file")
    return found.st_size


def is_regular(path: Path) -> bool:
    """Whether a regular file is there; False, too, for a name that no file can have."""
    try:
        return require_regular(path) >= 0
    except OSError:
        return False


def read_bytes(path: Path, limit: int) -> bytes:
    """A regular file of at most `limit` bytes. Raises OSError, also for a larger one."""
    size = require_regular(path)
    if size > limit:
        raise OSError(errno.EFBIG, f"has {size} bytes, expected at most {limit}")
    with path.open("rb") as file:
        return file.read(size)


def read_text(path: Path, limit: int = MOST_TEXT) -> str:
    """`read_bytes` as UTF-8. Raises OSError, UnicodeDecodeError (a ValueError)."""
    return read_bytes(path, limit).decode("utf-8")


def parse_json(text: str | bytes) -> Any:
    """JSON without NaN and Infinity. Raises ValueError for all that is not; nesting and digits have Python's limits."""
    try:
        return json.loads(text, parse_constant=_no_constant)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON; expected a finite number")
