"""The built-in suite: riddles of the small world, with and without thinking, scored exactly by `shapes`.

Both arms paint a riddle from the same noise. `images/think/00000.png` and `images/direct/00000.png` are one riddle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mindomni_rt.errors import BadRequestError

from .judge import RIDDLES, riddles, right
from .paint import paint, png
from .report import Share
from .run import RunFolder, item_file
from .suite import Item, Prompts, Settings, Suite, hashed

if TYPE_CHECKING:
    from mindomni_rt.pipeline import Pipeline

_ARMS = {"think": True, "direct": False}


def _read(path: Path | None) -> Prompts:
    if path is not None:
        raise BadRequestError("--prompts: the suite shapes has its own riddles; leave it out")
    items = [
        Item(
            name=f"{arm}-{index:05}",
            prompt=riddle.instruction,
            where=f"riddle {index}",
            key=f"{index:05}",
            think=think,
            row={"riddle": riddle, "arm": arm, "file": f"images/{arm}/{index:05}.png"},
        )
        for index, riddle in enumerate(riddles())
        for arm, think in _ARMS.items()
    ]
    return Prompts(files=(RIDDLES,), items=tuple(items), sha256=hashed([RIDDLES]))


def _outputs(item: Item, settings: Settings) -> list[str]:
    return [item.row["file"], item_file(item.name)]


def _make(pipe: Pipeline, item: Item, settings: Settings) -> dict[str, bytes]:
    (image,), record = paint(pipe, item, settings)
    return dict(zip(_outputs(item, settings), (png(image), record), strict=True))


def _finish(folder: RunFolder, done: Sequence[Item], chosen: Sequence[Item], run: Mapping[str, Any]) -> dict[str, Any]:
    """The exact share of right pictures by arm, read from the files."""
    scores = {}
    for arm, title in (("think", "exact, with thinking"), ("direct", "exact, without thinking")):
        found = [_right(folder, item) for item in done if item.row["arm"] == arm]
        if found:
            scores[title] = Share(right=sum(found), n=len(found)).to_dict()
    return {"scores": scores, "notes": []}


def _right(folder: RunFolder, item: Item) -> bool:
    with Image.open(folder.folder / item.row["file"]) as image:
        pixels: NDArray[np.float32] = np.asarray(image.convert("RGB"), np.float32) / np.float32(255)
        return right(item.row["riddle"], pixels)


def _commands(run: Mapping[str, Any]) -> list[str]:
    return []


SHAPES = Suite(
    name="shapes",
    title="shapes",
    prompts="nothing: benchmarks/quality/shapes.jsonl is built in",
    project="this one",
    evaluated="benchmarks/quality/judge.py, at once; for assets/shapes-world or its bundle",
    published={},
    defaults=Settings(samples=1, max_new_tokens=48),  # the arms think or not, whatever the setting says
    read=_read,
    outputs=_outputs,
    make=_make,
    finish=_finish,
    commands=_commands,
)
