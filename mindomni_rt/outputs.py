"""Files that commands write, and read again: whole or not at all, with an error that names them."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import BadRequestError, StorageError
from .files import read_text, replace_file, try_file, why

_STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Stores data at path, replacing what was there only when all of it is on disk; makes the folder.

    Raises StorageError.
    """
    data = data.encode() if isinstance(data, str) else data
    try:
        if path.exists() and not path.is_file():  # a device or pipe the user named: nothing to replace
            with path.open("wb") as file:
                file.write(data)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, lambda temporary: temporary.write_bytes(data))
    except OSError as error:
        why = error.strerror or error
        raise StorageError(f"{path} could not be written: {why}; free space or choose another --out") from error


@contextmanager
def storage_errors(what: str) -> Iterator[None]:
    """Gives a full disk, a quota, a limit or a read-only folder its name: raises StorageError for them."""
    try:
        yield
    except OSError as error:
        if error.errno not in _STORAGE:
            raise
        raise StorageError(f"{what} could not be written: {why(error)}; free space or choose another place") from error


def json_text(data: Any) -> str:
    """JSON with an indent of one."""
    return json.dumps(data, indent=1, ensure_ascii=False) + "\n"


def write_json(path: Path, data: Any) -> None:
    """`json_text` at path, atomically."""
    write_atomic(path, json_text(data))


def read_json(path: Path) -> Any:
    """A JSON file that the user names. Raises BadRequestError that names it."""
    try:
        return json.loads(read_text(path))
    except FileNotFoundError as error:
        raise BadRequestError(f"no file at {path}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise BadRequestError(f"{path} is not readable JSON: {why(error)}") from error


def check_target(path: Path, option: str = "--out") -> None:
    """Raises BadRequestError or StorageError if a file cannot be written at `path`, before work whose result goes
    there; makes its folder. A device or pipe that is there will be written to."""
    try:
        if path.is_dir():
            raise BadRequestError(f"{option} {path}: is a folder, expected the name of a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.is_file():
            try_file(path)
    except ValueError as error:
        if isinstance(error, BadRequestError):
            raise
        raise BadRequestError(f"{option} {path}: {error}") from error
    except OSError as error:
        raise StorageError(f"{option} {path}: {why(error)}; choose another {option}") from error
