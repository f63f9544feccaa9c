"""Records of webdataset shards: NAME.png (or another picture) with NAME.txt, a caption, or NAME.json, a record."""

from __future__ import annotations

import io
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from mindomni_rt.checks import shown
from mindomni_rt.errors import BadRequestError, MissingExtraError
from mindomni_rt.files import parse_json
from mindomni_rt.inputs.images import load_image

from ..errors import BadDataError
from .record import Record, parse_record

PICTURES = ("png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff")
_TAR_END = 1024  # bytes
# webdataset gives other addresses, and what stands between quotes in these, to a shell.
_ADDRESS = re.compile(r"https?://[\w.:/~%?&=@+,-]+")


def is_address(shard: str) -> bool:
    """Whether a shard is to be downloaded. Raises BadDataError for an address other than plain http and https."""
    if _ADDRESS.fullmatch(shard):
        return True
    if re.match(r"\w{2,}:", shard):
        raise BadDataError(f"{shown(shard)}: expected the path of a shard, or an address http(s)://… without quotes")
    return False


class ShardStream:
    """webdataset shards, read in sequence; shards are shuffled for every pass, records within a window of `shuffle`."""

    def __init__(self, shards: Sequence[str], seed: int, shuffle: int) -> None:
        self._shards, self._seed, self._window = list(shards), seed, max(1, shuffle)
        self._position = 0
        self._records = self._endless()

    def _endless(self) -> Iterator[Record]:
        turn = 0
        while True:
            order = random.Random(f"{self._seed} {turn}")
            shards = self._shards[:]
            order.shuffle(shards)
            held: list[Record] = []
            given = 0
            for record in self._read(shards):
                if len(held) < self._window:
                    held.append(record)
                    continue
                place = order.randrange(len(held))
                yield held[place]
                given, held[place] = given + 1, record
            order.shuffle(held)
            yield from held
            if not given and not held:
                raise BadDataError(f"{', '.join(self._shards)}: no record in these shards")
            turn += 1

    def _read(self, shards: Sequence[str]) -> Iterator[Record]:
        for shard in shards:
            _check_end(shard)
        try:
            import webdataset
        except ImportError as error:
            raise MissingExtraError("webdataset", "train") from error
        samples = webdataset.WebDataset(shards, shardshuffle=False, nodesplitter=None, empty_check=False)
        try:
            for sample in samples:
                yield _sample(sample)
        except (OSError, EOFError) as error:
            raise BadDataError(f"{', '.join(shards)}: {error}") from error
        except Exception as error:  # tarfile's and webdataset's own, which name the shard
            if isinstance(error, BadRequestError):
                raise
            raise BadDataError(f"shards {', '.join(shards)} cannot be read: {error}") from error

    def next_batch(self, count: int) -> list[Record]:
        """The next records."""
        self._position += count
        return list(islice(self._records, count))

    def state_dict(self) -> dict[str, int]:
        """The position: records given so far, and the size of the local shards."""
        return {"position": self._position, "bytes": self._bytes()}

    def _bytes(self) -> int:
        return sum(Path(s).stat().st_size for s in self._shards if Path(s).is_file())

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continues from a position by reading up to it. Raises BadDataError if the shards have changed since."""
        if state.get("bytes") != self._bytes():
            raise BadDataError(
                f"the shards have {self._bytes()} bytes, those of the run that is resumed had {state.get('bytes')}; "
                "restore them or use a new `out`"
            )
        self._position = int(state["position"])
        self._records = islice(self._endless(), self._position, None)


def _check_end(shard: str) -> None:
    """Refuses a truncated tar, which tarfile would read as a shorter one: a whole tar ends with two blocks of zeros."""
    path = Path(shard)
    if path.suffix != ".tar" or not path.is_file():
        return  # decompression and download check compressed and remote shards
    with path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(max(0, size - _TAR_END))
        tail = file.read()
    if len(tail) < _TAR_END or any(tail):
        raise BadDataError(f"{shard} is cut short ({size} bytes, no end of archive); copy it again")


def _sample(sample: Mapping[str, Any]) -> Record:
    """A record of the files that share a key: webdataset ends a key at the first dot of a file name."""
    source = f"{sample.get('__url__', '?')}:{sample.get('__key__', '?')}"
    files = {name: data for name, data in sample.items() if not name.startswith("__")}
    name = _only(files, PICTURES, "picture", source)
    strange = [n for n in files if _extension(n) not in (*PICTURES, "json", "txt")]
    if name is None and strange:
        raise BadDataError(
            f"{source}: .{strange[0]} is no picture that is read; expected one of {', '.join(PICTURES)}, or a .txt or "
            ".json alone"
        )
    text = _only(files, ("json",), ".json", source) or _only(files, ("txt",), ".txt", source)
    if text is None:
        raise BadDataError(f"{source}: expected a .txt or .json beside the image")
    try:
        if _extension(text) == "json":
            data = parse_json(files[text])
        else:
            caption = files[text].decode("utf-8").strip()
            data = {"instruction": caption, "gt_prompt": caption}
        picture = load_image(files[name]) if name is not None else None
    except (OSError, ValueError, RecursionError) as error:  # Unicode, JSON and image errors are ValueErrors
        raise BadDataError(f"{source}: {error}") from error
    record = parse_record(data, Path(), source)
    return record if picture is None else replace(record, output_image=picture)


def _extension(name: str) -> str:
    return name.rpartition(".")[2].lower()


def _only(files: Mapping[str, Any], extensions: Sequence[str], kind: str, source: str) -> str | None:
    """The name of the one file with such an extension; None without one. Several are an error."""
    found = [name for name in files if _extension(name) in extensions]
    if len(found) > 1:
        raise BadDataError(
            f"{source}: {len(found)} files are its {kind} ({', '.join(found)}); a key ends at the first dot of a file "
            "name, so give each sample a name without dots"
        )
    return found[0] if found else None
