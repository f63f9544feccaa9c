"""Files that commands write: whole or not at all, with an error that names them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import StorageError
from .files import replace_file


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


def json_text(data: Any) -> str:
    """JSON with an indent of one."""
    return json.dumps(data, indent=1, ensure_ascii=False) + "\n"


def write_json(path: Path, data: Any) -> None:
    """`json_text` at path, atomically."""
    write_atomic(path, json_text(data))
