"""The folder of a `quality` run: whose settings it holds, which items are done, how one is stored.

`run.json` holds the settings, `items/ID.json` the words of each item, and beside them lies what an evaluator reads.
Every file appears whole or not at all; an item is done when all of its files are there. Shards need no more than that
to share a folder, and a killed run loses the item under way.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mindomni_rt.errors import BadRequestError, StorageError
from mindomni_rt.outputs import write_atomic, write_json

from ..results import read_json

_ENDS = 1 << 20  # bytes at each end of a file that its fingerprint reads: a published checkpoint has 30 GB


def shard_of(text: str) -> tuple[int, int]:
    """ "i/n" → (i, n), 1 ≤ i ≤ n. Raises BadRequestError."""
    part, slash, count = text.partition("/")
    if not (slash and part.isdecimal() and count.isdecimal() and 1 <= int(part) <= int(count)):
        raise BadRequestError(f"--shard {text!r}: expected I/N with I from 1 to N, for example 1/4")
    return int(part), int(count)


def seed_of(base: int, key: str, sample: int) -> int:
    """The seed, 32 bits, of one image: of its prompt's id, not of its place, so that shards and --n change nothing."""
    return int.from_bytes(hashlib.sha256(f"{base}\n{key}\n{sample}".encode()).digest()[:4], "big")


def item_file(name: str) -> str:
    """Where the words of an item lie, outside of every folder that an evaluator walks."""
    return f"items/{name}.json"


def fingerprint(folder: Path) -> str:
    """Tells one model from another: sha256 over each file's path, size and first and last MiB."""
    whole = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):  # caches and locks of downloaders
            continue
        size = path.stat().st_size
        whole.update(f"{path.relative_to(folder).as_posix()}\0{size}\0".encode())
        with path.open("rb") as file:
            whole.update(file.read(_ENDS))
            file.seek(max(0, size - _ENDS))
            whole.update(file.read(_ENDS))
    return whole.hexdigest()


class RunFolder:
    """One run's folder, shared by its shards."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings = folder / "run.json"

    def check(self, asked: Mapping[str, Any]) -> bool:
        """Whether a run with these settings lives here already; False for an empty or absent folder.

        Raises BadRequestError for a run with other settings and for a folder that holds something else.
        """
        # Listed before the look for run.json: another shard may make it, and then items, between the two.
        files = list(self.folder.iterdir()) if self.folder.is_dir() else []
        if not self.settings.exists():
            if any(not (p.name.startswith(".") and ".part" in p.suffix) for p in files):
                raise BadRequestError(f"{self.folder} holds files but no run.json: choose an empty folder for --out")
            return False
        found = read_json(self.settings)
        if not isinstance(found, dict) or not isinstance(found.get("runs_on"), dict):
            raise BadRequestError(f"{self.settings} is no record of a run's settings; choose another --out")
        for key, value in _flat(asked).items():
            if (there := _flat(found).get(key)) != value:
                raise BadRequestError(
                    f"{self.folder} holds a run with {key} = {there!r}, asked now: {value!r}; "
                    "give the same settings or choose another --out"
                )
        return True

    def claim(self, asked: Mapping[str, Any]) -> None:
        """Stores the settings unless another shard was first, whose settings must then be the same."""
        if not self.check(asked):
            # Two shards may get here at once: a link is made by one of them only, and it never shows half a file.
            temporary = self.folder / f".run.json.{os.getpid()}-{secrets.token_hex(4)}.part"
            write_json(temporary, asked)
            try:
                os.link(temporary, self.settings)
            except FileExistsError:
                pass
            except OSError as error:
                raise StorageError(
                    f"{self.settings} could not be made: {error.strerror}; choose another --out"
                ) from error
            finally:
                temporary.unlink(missing_ok=True)
            self.check(asked)

    def done(self, outputs: Iterable[str]) -> bool:
        """Whether all of an item's files are there."""
        return all((self.folder / name).is_file() for name in outputs)

    def store(self, files: Mapping[str, bytes]) -> None:
        """Writes an item's files. Raises StorageError."""
        for name, data in files.items():
            write_atomic(self.folder / name, data)

    def sweep(self) -> None:
        """Removes what killed runs left half written among the items, once all are done and nobody writes any."""
        for part in ("images", "items"):  # not beside them, where another shard may be writing its report
            for path in (self.folder / part).rglob(".*.part*"):
                path.unlink(missing_ok=True)


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} → {"a.b": 1}, so that an error can name the one setting that differs."""
    out: dict[str, Any] = {}
    for key, value in data.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return out
