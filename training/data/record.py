"""One training example, and how a JSON object becomes one.

{"instruction": …, "instruction_qwen": …, "think_content": …, "input_images": [paths], "output_image": path,
"gt_prompt": …, "reply": …}. All keys but `instruction` are optional; others of OmniGen's format (`task_type`,
`input_image`, `output_images`) are not accepted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image, UnidentifiedImageError

from mindomni_rt.files import require_regular, why
from mindomni_rt.inputs.opening import FORMATS

from ..errors import BadDataError

KEYS = ("instruction", "instruction_qwen", "think_content", "input_images", "output_image", "gt_prompt", "reply")


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
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            raise BadDataError(f"{source}: {key} holds half a surrogate pair, which is no character")
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
    try:
        require_regular(path)
        with Image.open(path, formats=FORMATS):  # its header; a file that is cut short is named when it is read
            return path
    except FileNotFoundError as error:
        raise BadDataError(f"{source}: {key} {path} does not exist") from error
    except UnidentifiedImageError as error:
        raise BadDataError(f"{source}: {key} {path}: expected one of {', '.join(FORMATS)}") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadDataError(f"{source}: {key} {path} is no readable image: {why(error)}") from error
