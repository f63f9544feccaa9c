"""Records of JSON lines files, shuffled anew in every pass."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mindomni_rt.files import parse_json, require_regular, why

from ..errors import BadDataError
from .record import Record, parse_record


class LineStream:
    """JSON lines of one or more files, in an order that changes with every pass. Files are indexed once, not held."""

    def __init__(self, files: Sequence[tuple[Path, Path]], seed: int) -> None:
        self._files, self._seed, self._position = list(files), seed, 0
        self._checksum = 0
        self._lines = [line for index in range(len(self._files)) for line in self._scan(index)]
        if not self._lines:
            names = ", ".join(str(f) for f, _ in files)
            raise BadDataError(f"{names}: no record in it")
        self._order: tuple[int, Any] = (-1, None)

    def _scan(self, index: int) -> Iterator[tuple[int, int, int]]:
        """(file, byte offset, line number) of every line that holds something."""
        path, _ = self._files[index]
        try:
            require_regular(path)
            with path.open("rb") as file:
                offset = 0
                for number, line in enumerate(file, 1):
                    self._checksum = zlib.crc32(line, self._checksum)
                    if line.strip():
                        yield index, offset, number
                    offset += len(line)
        except OSError as error:
            raise BadDataError(f"{path}: {why(error)}") from error

    def next_batch(self, count: int) -> list[Record]:
        """The next records. Raises BadDataError for a bad line, naming it."""
        return [self._next() for _ in range(count)]

    def _next(self) -> Record:
        turn, place = divmod(self._position, len(self._lines))
        if self._order[0] != turn:
            self._order = (turn, np.random.default_rng([self._seed, turn]).permutation(len(self._lines)))
        self._position += 1
        index, offset, number = self._lines[int(self._order[1][place])]
        path, root = self._files[index]
        source = f"{path}:{number}"
        with path.open("rb") as file:
            file.seek(offset)
            line = file.readline()
        try:
            data = parse_json(line.decode("utf-8-sig"))
        except ValueError as error:
            raise BadDataError(f"{source}: not valid JSON ({error})") from error
        return parse_record(data, root, source)

    def state_dict(self) -> dict[str, int]:
        """The position: records given so far."""
        return {"position": self._position, "records": len(self._lines), "checksum": self._checksum}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continues from a position. Raises BadDataError if the files have changed since."""
        if state.get("records") != len(self._lines):
            raise BadDataError(
                f"the data has {len(self._lines)} records, the run that is resumed had {state.get('records')}; restore "
                "the files or use a new `out`"
            )
        if state.get("checksum") != self._checksum:
            names = ", ".join(str(path) for path, _ in self._files)
            raise BadDataError(
                f"the text of {names} has changed since the run that is resumed; restore the files or use a new `out`"
            )
        self._position = int(state["position"])
