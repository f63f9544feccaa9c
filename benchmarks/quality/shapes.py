"""The built-in suite: riddles of the small world, with and without thinking, scored exactly by `shapes`.

Both arms paint a riddle from the same noise. `images/think/00000.png` and `images/direct/00000.png` are one riddle.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mindomni_rt.scores import Score

from .judge import RIDDLES, riddles, right
from .paint import one_grid
from .run import RunFolder
from .suite import Item, Settings, Suite

_ARMS = {"think": True, "direct": False}


def _items(path: Path) -> Iterator[Item]:
    for index, riddle in enumerate(riddles(path)):
        for arm, think in _ARMS.items():
            yield Item(
                name=f"{arm}-{index:05}",
                prompt=riddle.instruction,
                where=f"riddle {index}",
                key=f"{index:05}",
                think=think,
                file=f"images/{arm}/{index:05}.png",
                row=riddle,
            )


def _scores(folder: RunFolder, done: Sequence[Item]) -> dict[str, Any]:
    """The exact share of right pictures by arm, read from the files."""
    marks: dict[str, list[bool]] = {}
    for item in sorted(done, key=lambda item: not item.think):
        with Image.open(folder.folder / item.picture) as image:
            pixels = np.asarray(image.convert("RGB"), np.float32) / np.float32(255)
        title = "exact, with thinking" if item.think else "exact, without thinking"
        marks.setdefault(title, []).append(right(item.row, pixels))
    return {title: Score(right=sum(found), n=len(found)).to_dict() for title, found in marks.items()}


SHAPES = Suite(
    name="shapes",
    title="shapes",
    prompts="nothing: benchmarks/quality/shapes.jsonl is built in",
    project="this one",
    evaluated="benchmarks/quality/judge.py, at once; for assets/shapes-world or its bundle",
    published={},
    defaults=Settings(samples=1, max_new_tokens=48),  # the arms think or not, whatever the setting says
    items=_items,
    builtin=RIDDLES,
    files=one_grid,
    scores=_scores,
)
