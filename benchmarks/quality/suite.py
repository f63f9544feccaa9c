"""What a suite of `quality` is: items read from a user's prompt file, what is written for each, who reads that.

The suites themselves are data in `suites`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from mindomni_rt.checkpoint.config import RecommendedConfig
from mindomni_rt.errors import BadRequestError
from mindomni_rt.files import MOST_TEXT, read_bytes

from .run import RunFolder, item_file

_LONGEST_NAME = 200  # bytes; file systems take 255, and a temporary name and a suffix come on top


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How images are made. size: side in pixels. samples: images a prompt. think None: each item says.

    size, steps and guidance None: the model's own, which `of_model` fills in.
    """

    seed: int = 0
    think: bool | None = None
    samples: int = 1
    size: int | None = None
    steps: int | None = None
    guidance: float | None = None
    max_new_tokens: int = 512

    def of_model(self, recommended: RecommendedConfig) -> Settings:
        """The same with the model's own settings in place of None."""
        own: dict[str, Any] = {"size": recommended.width, "steps": recommended.num_inference_steps}
        own |= {"guidance": recommended.guidance_scale}
        return replace(self, **{name: value for name, value in own.items() if getattr(self, name) is None})


@dataclass(frozen=True, kw_only=True)
class Item:
    """One prompt. name: its id, which becomes a file name. where: its place in the prompt file, for errors.

    file: its picture in the run's folder, images/NAME.png if empty. key: what its seeds follow from, the name if empty.
    think: overrides the setting. row: what else the suite keeps of it.
    """

    name: str
    prompt: str
    where: str
    file: str = ""
    key: str = ""
    think: bool | None = None
    row: Any = None

    @property
    def picture(self) -> str:
        return self.file or f"images/{self.name}.png"


Writer = Callable[[Sequence[Image.Image]], bytes]
"""The bytes of a file from an item's samples."""


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A benchmark: what it reads and writes, and what was published.

    prompts: the expected file, project: the repository it comes from. evaluated: reads the folder, in one line.
    find: the prompt files in a folder; items: what one holds, BadRequestError where it is damaged. builtin: the file
    of a suite that takes no --prompts. files: what an evaluator reads of an item, relative to the run's folder, and
    what makes it. scores: of the done items, by title. commands: the evaluator's command lines, with $RUN for the
    run's folder.
    """

    name: str
    title: str
    prompts: str
    project: str
    evaluated: str
    published: Mapping[str, str]
    defaults: Settings
    most_samples: int = 1
    find: Callable[[Path], list[Path]] = lambda folder: []
    items: Callable[[Path], Iterable[Item]]
    builtin: Path | None = None
    files: Callable[[Item, Settings], dict[str, Writer]]
    scores: Callable[[RunFolder, Sequence[Item]], dict[str, Any]] = lambda folder, done: {}
    commands: Callable[[Mapping[str, Any]], list[str]] = lambda run: []

    def read(self, path: Path | None) -> tuple[list[Path], list[Item]]:
        """The files that --prompts stands for, and their items in order. Raises BadRequestError."""
        if path is not None and self.builtin:
            raise BadRequestError(f"--prompts: the suite {self.name} has its own riddles; leave it out")
        path = path or self.builtin
        if path is None:
            raise BadRequestError(f"--prompts is missing: {self.wanted}")
        if not path.exists():
            raise BadRequestError(f"nothing at {path}: {self.wanted}")
        if not os.access(path, os.R_OK):
            raise BadRequestError(f"{path} may not be read: give its owner's rights or another copy")
        files, seen = self.find(path) if path.is_dir() else [path], dict[str, Item]()
        if lacking := [file.name for file in files if not file.is_file()]:
            raise BadRequestError(f"no {lacking[0]} in {path}: {self.wanted}")
        for item in (item for file in files for item in self.items(file)):
            if item.name in seen:
                raise BadRequestError(f"{item.where}: id {item.name!r} was already used at {seen[item.name].where}")
            seen[item.name] = item
        if not seen:
            raise BadRequestError(f"{path} holds no prompts: {self.wanted}")
        return files, list(seen.values())

    @property
    def wanted(self) -> str:
        """What --prompts must name, for errors."""
        return f"{self.title} needs {self.prompts} of {self.project}; pass your copy as --prompts"


@dataclass(frozen=True, kw_only=True)
class Job:
    """A suite with its settings in a folder. chosen: the items that were asked for, of `total`."""

    suite: Suite
    settings: Settings
    folder: RunFolder
    chosen: Sequence[Item]
    total: int

    def done(self) -> list[Item]:
        """The items whose files are all there."""
        files = self.suite.files
        return [i for i in self.chosen if self.folder.done([*files(i, self.settings), item_file(i.name)])]


def text_of(path: Path) -> str:
    """A UTF-8 file's text, a byte order mark removed. Raises BadRequestError."""
    try:
        return read_bytes(path, MOST_TEXT).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadRequestError(f"{path} is not UTF-8 text: byte {error.start} is {error.reason}") from error
    except OSError as error:
        raise BadRequestError(f"{path} cannot be read: {error.strerror or error}") from error


def hashed(files: Iterable[Path]) -> str:
    """sha256 over names and contents, read in pieces."""
    whole = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            whole.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()


def checked_prompt(value: Any, where: str, name: str = "prompt") -> str:
    """A text that a model can be asked. Raises BadRequestError."""
    if not isinstance(value, str) or not value.strip():
        raise BadRequestError(f"{where}: expected a text under {name!r}, found {value!r}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRequestError(f"{where}: {name!r} holds half a surrogate pair, which is no character") from error
    return value


def checked_name(value: Any, where: str) -> str:
    """An id that is safe as a file name of any evaluator. Raises BadRequestError."""
    text = str(value) if isinstance(value, (str, int)) and not isinstance(value, bool) else ""
    bad = not text.strip() or text.startswith(".") or any(c in "/\\" or not c.isprintable() for c in text)
    if bad or len(text.encode()) > _LONGEST_NAME:
        raise BadRequestError(
            f"{where}: id {str(value)[:80]!r} cannot name a file: expected a number or text of at most "
            f"{_LONGEST_NAME} bytes with no path separator, control character or leading dot"
        )
    return text
