"""Rollouts as files: texts with rewards as JSON lines, images as a grid with a labelled row for each group."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from mindomni_rt.files import replace_file, write_text

from ..errors import StorageError
from ..stages.base import Sample

_GAP, _LINE = 4, 14  # pixels


def labelled_grid(samples: Sequence[Sample]) -> Image.Image:
    """One row for each group: its prompt above, each image with its reward below."""
    groups: dict[int, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.group, []).append(sample)
    height, width = samples[0].image.shape[:2]
    columns = max(len(row) for row in groups.values())
    across = columns * (width + _GAP) + _GAP
    font = ImageFont.load_default(size=11)
    letters = max(8, int(across / font.getlength("n")))
    titles = {g: textwrap.wrap(f"group {g + 1}: {row[0].prompt}", letters)[:2] for g, row in groups.items()}
    row_height = height + 3 * _LINE + 2 * _GAP
    grid = Image.new("RGB", (across, row_height * len(groups) + _GAP), "white")
    pen = ImageDraw.Draw(grid)
    for index, (group, row) in enumerate(groups.items()):
        top = index * row_height + _GAP
        for place, line in enumerate(titles[group]):
            pen.text((_GAP, top + place * _LINE), line, fill="black", font=font)
        for column, sample in enumerate(row):
            left, under = _GAP + column * (width + _GAP), top + 2 * _LINE
            grid.paste(Image.fromarray(sample.image), (left, under))
            pen.rectangle((left - 1, under - 1, left + width, under + height), outline="lightgrey")
            pen.text((left, under + height + 1), f"reward {sample.reward:.3f}", fill="black", font=font)
    return grid


def dump_rollouts(folder: Path, step: int, samples: Sequence[Sample]) -> Image.Image:
    """Writes folder/step-N.jsonl and .png; returns the image. Raises StorageError."""
    name = folder / f"step-{step:06d}"
    text = "".join(json.dumps(s.to_dict(), ensure_ascii=False) + "\n" for s in samples)
    grid = labelled_grid(samples)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(name.with_suffix(".jsonl"), text)
        replace_file(name.with_suffix(".png"), lambda temporary: grid.save(temporary, "PNG"))
    except OSError as error:
        raise StorageError(f"rollouts {name} cannot be written: {error.strerror or error}") from error
    return grid
