"""JSON files of a checkpoint: read with limits, and their values taken by name and type."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checks import shown
from ..errors import BadCheckpointError
from ..files import parse_json, read_text, why

MOST_BYTES = 64 * 2**20  # an index of a very large model has a few MiB


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises BadCheckpointError naming the file."""
    try:
        data = parse_json(read_text(path, MOST_BYTES))
    except FileNotFoundError as error:
        raise BadCheckpointError(f"{path} is missing") from error
    except OSError as error:
        raise BadCheckpointError(f"{path}: {why(error)}") from error
    except ValueError as error:
        raise BadCheckpointError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(data, dict):
        raise BadCheckpointError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data


def optional_json(path: Path) -> dict[str, Any]:
    """The same, or an empty object where the file is absent."""
    return read_json(path) if path.exists() or path.is_symlink() else {}


class Keys:
    """The keys of one JSON object, each taken by name; errors name the file and the key."""

    def __init__(self, data: Mapping[str, Any], where: str) -> None:
        self.data, self.where = data, where

    def __getitem__(self, key: str) -> Any:
        if self.data.get(key) is None:
            raise BadCheckpointError(f"{self.where} lacks {key!r}")
        return self.data[key]

    def get(self, key: str, default: Any = None) -> Any:
        """The value, or the default where the key is absent or null."""
        value = self.data.get(key)
        return default if value is None else value

    def part(self, key: str) -> Keys:
        """An object inside this one; empty where the key is absent or null."""
        value = self.get(key, {})
        if not isinstance(value, dict):
            raise self.bad(key, "an object")
        return Keys(value, f"{self.where}, {key}")

    def require(self, allowed: Mapping[str, tuple[Any, ...]]) -> None:
        """Refuses each key whose value is none of those that this program computes with; null and absent are fine."""
        for key, values in allowed.items():
            value = self.data.get(key)
            if value is not None and not any(value == v and type(value) in _kinds(v) for v in values):
                expected = " or ".join(shown(v) for v in values) if values else "no such key"
                raise self.bad(key, f"{expected}; another value is not supported")

    def bad(self, key: str, expected: str) -> BadCheckpointError:
        """The error for a key's value."""
        return BadCheckpointError(f"{self.where}: {key} = {shown(self.data.get(key))}: expected {expected}")


def _kinds(value: Any) -> tuple[type, ...]:
    """Types that count as the same value: 1 and 1.0, but not 1 and true."""
    return (int, float) if type(value) in (int, float) else (type(value),)
