"""A file of prompts: one JSON object a line, each a `Request` or `UnderstandRequest` under an id of its own."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any

from mindomni_rt.checks import shown
from mindomni_rt.errors import BadRequestError
from mindomni_rt.files import parse_json, read_bytes
from mindomni_rt.inputs.opening import MAX_BYTES
from mindomni_rt.options import parse_size
from mindomni_rt.request import Request, UnderstandRequest, as_request

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_KINDS: dict[str, type[Request] | type[UnderstandRequest]] = {"generate": Request, "understand": UnderstandRequest}
_MOST_BYTES = 2**31
_MOST_TOLD = 10  # mistakes that one message names
_NOT_HERE = ("latents", "output", "preview_every")


@dataclass(frozen=True, kw_only=True)
class Task:
    """One line: plain data, which travels to other processes."""

    id: str
    kind: str
    prompt: str
    options: Mapping[str, Any]
    digest: str
    """Of all that decides the result, the model's name and the picture's bytes among it."""

    def request(self) -> Request | UnderstandRequest:
        """Checked when the file was read."""
        options = dict(self.options)
        if options.get("image") is not None and not str(options["image"]).startswith("data:"):
            options["image"] = read_bytes(Path(options["image"]), MAX_BYTES)
        if self.kind == "understand":
            return as_request(UnderstandRequest, self.prompt, options)
        return as_request(Request, self.prompt, options)


def read_tasks(path: Path, model: str, defaults: Mapping[str, Any]) -> list[Task]:
    """All lines, checked, before anything is painted. Raises BadRequestError naming the lines with mistakes."""
    try:
        lines = read_bytes(path, _MOST_BYTES).decode("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BadRequestError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    tasks: dict[str, Task] = {}
    mistakes: list[str] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            task = _task(line, number, path.parent, model, defaults)
            if task.id in tasks:
                raise BadRequestError(f"id {task.id!r} is there twice")
        except (BadRequestError, OSError, ValueError) as error:
            mistakes.append(f"line {number}: {getattr(error, 'strerror', None) or error}")
            continue
        tasks[task.id] = task
    if mistakes:
        more = f"; {len(mistakes) - _MOST_TOLD} more" if len(mistakes) > _MOST_TOLD else ""
        raise BadRequestError(f"{path}, {'; '.join(mistakes[:_MOST_TOLD])}{more}")
    if not tasks:
        raise BadRequestError(f'{path}: no line; expected {{"prompt": "…"}}, one a line')
    return list(tasks.values())


def _task(line: str, number: int, folder: Path, model: str, defaults: Mapping[str, Any]) -> Task:
    fields = parse_json(line)
    if not isinstance(fields, dict):
        raise BadRequestError('expected an object such as {"prompt": "three yellow circles"}')
    name, kind = str(fields.pop("id", f"{number:06d}")), fields.pop("task", "generate")
    if not _ID.fullmatch(name):
        raise BadRequestError(f"id {shown(name)}: expected letters, digits, '.', '_' and '-', at most 100")
    if kind not in _KINDS:
        raise BadRequestError(f"task = {shown(kind)}: expected one of {', '.join(_KINDS)}")
    for given in fields:
        if given in _NOT_HERE:
            raise BadRequestError(f"there is no option {given!r} here")
    if "size" in fields:
        fields["width"], fields["height"] = parse_size(str(fields.pop("size")))
    prompt = fields.pop("prompt", None)
    known = {f.name for f in dataclass_fields(_KINDS[kind])}
    options = {k: v for k, v in defaults.items() if k in known} | fields
    # The same seed in every run and on every replica, and another one for each line.
    options.setdefault("seed", int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big"))
    picture = ""
    if (image := options.get("image")) is not None:
        if not isinstance(image, str):
            raise BadRequestError("image: expected a path beside this file, or a data URI")
        if not image.startswith("data:"):
            options["image"] = image = str((folder / image).absolute())
            picture = hashlib.sha256(read_bytes(Path(image), MAX_BYTES)).hexdigest()
    whole = json.dumps([model, kind, prompt, {**options, "image": picture or image}], sort_keys=True)
    task = Task(id=name, kind=kind, prompt=prompt, options=options, digest=hashlib.sha256(whole.encode()).hexdigest())
    task.request()
    return task
