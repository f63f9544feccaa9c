"""Records of webdataset shards: NAME.png (or another picture) with NAME.txt, a caption, or NAME.json, a record."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from mindomni_rt.errors import BadRequestError, MissingExtraError

from ..errors import BadDataError
from .record import Record, parse_record

_TAR_END = 1024  # bytes


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
        """The position: records given so far."""
        return {"position": self._position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continues from a position by reading up to it."""
        self._position = int(state["position"])
        self._records = islice(self._endless(), self._position, None)


def _check_end(shard: str) -> None:
    """A tar closes with two blocks of zeros; one that was cut reads as a shorter one, without a word."""
    path = Path(shard)
    if path.suffix != ".tar" or not path.is_file():
        return  # compressed and remote shards are checked by who unpacks them
    with path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(max(0, size - _TAR_END))
        tail = file.read()
    if len(tail) < _TAR_END or any(tail):
        raise BadDataError(f"{shard} is cut short ({size} bytes, no end of archive); copy it again")


def _sample(sample: Mapping[str, Any]) -> Record:
    source = f"{sample.get('__url__', '?')}:{sample.get('__key__', '?')}"
    image = next((sample[k] for k in ("png", "jpg", "jpeg", "webp") if k in sample), None)
    try:
        picture = Image.open(io.BytesIO(image)).convert("RGB") if image is not None else None
        if "json" in sample:
            data = json.loads(sample["json"])
        elif "txt" in sample:
            text = sample["txt"].decode("utf-8").strip()
            data = {"instruction": text, "gt_prompt": text}
        else:
            raise BadDataError(f"{source}: expected a .txt or .json beside the image")
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadDataError(f"{source}: {error}") from error
    record = parse_record(data, Path(), source)
    return Record(**{**record.__dict__, "output_image": picture if picture is not None else record.output_image})
