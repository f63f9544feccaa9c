"""Examples that a model can follow, and the values that its controls start with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindomni_rt.demo import DEMO_SETTINGS
from mindomni_rt.errors import MindOmniError
from mindomni_rt.inputs.prompts import Chat
from mindomni_rt.request import Request, complete

from ..model import Model


@dataclass(frozen=True)
class Examples:
    """Prompts for each tab."""

    generate: tuple[str, ...]
    edit: tuple[str, ...]
    understand: tuple[str, ...]


GENERAL = Examples(
    generate=(
        "an animal with (3 + 6) lives",
        "the fruit that fell beside Newton, on a wooden table",
        "the tower that Paris is known for, in the season after autumn",
    ),
    edit=("make it winter", "turn the day into night", "paint it as a watercolour"),
    understand=("What is in this picture?", "What is unusual here?", "How many people are there?"),
)
SHAPES_WORLD = Examples(
    generate=(
        "draw (1 + 2) things of the colour of a lemon, shaped like a wheel",
        "i want (2 + 4) things, shaped like a tent and of the colour of the sea",
        "draw (7 - 2) things of the colour of grass, shaped like a window",
    ),
    edit=(
        "the same, but one more and in the colour of the sea",
        "the same, but one fewer and in the same colour",
    ),
    understand=("describe the picture.", "how many things are there?", "what colour are they?"),
)


def knows_few_words(model: Model) -> bool:
    """Whether its tokenizer is one of whole words, as the small model's: other words would be unknown to it."""
    folder = Path(model.path)
    folder = folder / "mllm" if (folder / "mllm").is_dir() else folder
    try:
        return folder.is_dir() and Chat(folder).token_id("<unk>") is not None
    except MindOmniError:
        return False  # `load` says what is wrong with it


def examples_of(model: Model) -> Examples:
    """Those that fit the model."""
    return SHAPES_WORLD if knows_few_words(model) else GENERAL


def defaults_of(model: Model) -> Mapping[str, Any]:
    """The values of all controls at first: the model's defaults, else those of `Request`."""
    given = {**(DEMO_SETTINGS if knows_few_words(model) else {}), **model.defaults}
    return complete(Request(prompt="-", **given), model.recommended()).settings()
