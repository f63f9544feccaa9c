"""Records and where they come from: JSON lines, YAML lists of them, webdataset shards, or the synthetic world.

A JSON line: {"instruction": …, "instruction_qwen": …, "think_content": …, "input_images": [paths],
"output_image": path, "gt_prompt": …, "reply": …}. All keys but `instruction` are optional; others of OmniGen's format
(`task_type`, `input_image`, `output_images`) are not. Paths are relative to `image_root`, or to the file.
A YAML file: {datasets: [{json_path: …, image_dir: …}]}. A shard: NAME.png or .jpg with NAME.txt (a caption) or
NAME.json (a record without `output_image`).

A stream is infinite and in a fixed order that its seed decides, so its position is one number.
"""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from mindomni_rt.errors import BadRequestError, MissingExtraError

from ..config import DataConfig

KEYS = ("instruction", "instruction_qwen", "think_content", "input_images", "output_image", "gt_prompt", "reply")


_TAR_END = 1024  # bytes


class BadDataError(BadRequestError):
    """A data file or record that cannot be used. The message names file and line."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One example. Images are paths or PIL images; empty strings stand for what it has not.

    think_content and answer: what the model is to write before painting. reply: what it is to answer to a question
    about the picture. gt_prompt: a plain description of the image asked for. edit_features: "vit" or "vit+vae", empty
    for the model's own. source: where it was read, for error messages.
    """

    instruction: str
    think_content: str = ""
    answer: str = ""
    input_images: tuple[Any, ...] = ()
    output_image: Any = None
    gt_prompt: str = ""
    reply: str = ""
    edit_features: str = ""
    source: str = ""


class Stream(Protocol):
    """Records without end, with a position that can be stored."""

    def next_batch(self, count: int) -> list[Record]: ...
    def state_dict(self) -> dict[str, int]: ...
    def load_state_dict(self, state: Mapping[str, int]) -> None: ...


def parse_record(data: Any, root: Path, source: str) -> Record:
    """A JSON object as a record, checked. Raises BadDataError naming `source` and the key."""
    if not isinstance(data, dict):
        raise BadDataError(f"{source}: expected a JSON object, found {type(data).__name__}")
    unknown = sorted(set(data) - set(KEYS))
    if unknown:
        raise BadDataError(f"{source}: unknown key {unknown[0]!r}; expected some of {', '.join(KEYS)}")
    texts = {k: data.get(k) or "" for k in KEYS if k not in ("input_images", "output_image")}
    for key, value in texts.items():
        if not isinstance(value, str):
            raise BadDataError(f"{source}: {key} is {type(value).__name__}; expected a string")
    if not texts["instruction"].strip():
        raise BadDataError(f"{source}: 'instruction' is missing or empty")
    images = data.get("input_images") or []
    if not isinstance(images, list) or not all(isinstance(i, str) for i in images):
        raise BadDataError(f"{source}: input_images is {images!r}; expected a list of paths")
    output = data.get("output_image")
    if output is not None and not isinstance(output, str):
        raise BadDataError(f"{source}: output_image is {output!r}; expected a path")
    if texts["reply"] and not images:
        raise BadDataError(f"{source}: a reply needs the picture that it is about in input_images")
    return Record(
        instruction=texts["instruction"],
        think_content=texts["think_content"],
        answer=texts["instruction_qwen"]
        or (texts["gt_prompt"] or texts["instruction"] if texts["think_content"] else ""),
        input_images=tuple(_existing(root / i, source, "input_images") for i in images),
        output_image=_existing(root / output, source, "output_image") if output else None,
        gt_prompt=texts["gt_prompt"],
        reply=texts["reply"],
        source=source,
    )


def _existing(path: Path, source: str, key: str) -> Path:
    if not path.is_file():
        raise BadDataError(f"{source}: {key} {path} does not exist")
    try:
        with Image.open(path):  # its header; a file that is cut short is named when it is read
            return path
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise BadDataError(f"{source}: {key} {path} is no readable image ({error})") from error


class LineStream:
    """JSON lines of one or more files, in an order that changes with every pass. Files are indexed once, not held."""

    def __init__(self, files: Sequence[tuple[Path, Path]], seed: int) -> None:
        self._files, self._seed, self._position = list(files), seed, 0
        self._lines = [line for index in range(len(self._files)) for line in self._scan(index)]
        if not self._lines:
            names = ", ".join(str(f) for f, _ in files)
            raise BadDataError(f"{names}: no record in it")
        self._order: tuple[int, Any] = (-1, None)

    def _scan(self, index: int) -> Iterator[tuple[int, int, int]]:
        """(file, byte offset, line number) of every line that holds something."""
        path, _ = self._files[index]
        try:
            with path.open("rb") as file:
                offset = 0
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield index, offset, number
                    offset += len(line)
        except OSError as error:
            raise BadDataError(f"{path}: {error.strerror}") from error

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
            data = json.loads(line.decode("utf-8-sig"))
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise BadDataError(f"{source}: not valid JSON ({error})") from error
        return parse_record(data, root, source)

    def state_dict(self) -> dict[str, int]:
        """The position: records given so far."""
        return {"position": self._position, "records": len(self._lines)}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continues from a position. Raises BadDataError if the files have changed since."""
        if state.get("records") != len(self._lines):
            raise BadDataError(
                f"the data has {len(self._lines)} records, the run that is resumed had {state.get('records')}; restore "
                "the files or start a new run"
            )
        self._position = int(state["position"])


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


def open_stream(config: DataConfig, stage: str, seed: int) -> Stream:
    """The stream of a stage's configuration. Raises BadDataError."""
    if config.source == "world":
        from .world.sources import WorldStream

        return WorldStream(config.split or stage, seed)
    if config.source == "webdataset":
        for shard in config.paths:
            if "://" not in shard and not Path(shard).is_file():
                raise BadDataError(f"{shard}: no such shard")
        return ShardStream(config.paths, seed, config.shuffle)
    files: list[tuple[Path, Path]] = []
    for name in config.paths:
        path = Path(name)
        root = Path(config.image_root) if config.image_root else path.parent
        files += _listed(path) if path.suffix in (".yaml", ".yml") else [(path, root)]
    return LineStream(files, seed)


def _listed(path: Path) -> list[tuple[Path, Path]]:
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        entries = data if isinstance(data, list) else data["datasets"]
        return [
            (path.parent / e["json_path"], path.parent / e.get("image_dir", Path(e["json_path"]).parent))
            for e in entries
        ]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise BadDataError(
            f"{path}: expected {{datasets: [{{json_path: …, image_dir: …}}]}} ({type(error).__name__}: {error})"
        ) from error
