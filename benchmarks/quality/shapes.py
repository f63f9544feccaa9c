"""The built-in suite: riddles of the small world, with and without thinking, scored exactly by `shapes`.

Both arms paint a riddle from the same noise. `images/think/00000.png` and `images/direct/00000.png` are one riddle.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mindomni_rt.errors import BadRequestError
from mindomni_rt.scores import Score

from .judge import RIDDLES, riddles, right
from .paint import one_grid
from .run import RunFolder
from .suite import Item, Prompts, Settings, Suite, hashed

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
            file=f"images/{arm}/{index:05}.png",
            row=riddle,
        )
        for index, riddle in enumerate(riddles())
        for arm, think in _ARMS.items()
    ]
    return Prompts(files=(RIDDLES,), items=tuple(items), sha256=hashed([RIDDLES]))


def _scores(folder: RunFolder, done: Sequence[Item]) -> dict[str, Any]:
    """The exact share of right pictures by arm, read from the files."""
    scores = {}
    for think, title in ((True, "exact, with thinking"), (False, "exact, without thinking")):
        found = [_right(folder, item) for item in done if item.think is think]
        if found:
            scores[title] = Score(right=sum(found), n=len(found)).to_dict()
    return scores


def _right(folder: RunFolder, item: Item) -> bool:
    with Image.open(folder.folder / item.picture) as image:
        pixels: NDArray[np.float32] = np.asarray(image.convert("RGB"), np.float32) / np.float32(255)
        return right(item.row, pixels)


SHAPES = Suite(
    name="shapes",
    title="shapes",
    prompts="nothing: benchmarks/quality/shapes.jsonl is built in",
    project="this one",
    evaluated="benchmarks/quality/judge.py, at once; for assets/shapes-world or its bundle",
    published={},
    defaults=Settings(samples=1, max_new_tokens=48),  # the arms think or not, whatever the setting says
    read=_read,
    files=one_grid,
    scores=_scores,
)
