"""TensorBoard events of a run: scalars, rollout texts and images."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..stages.base import Sample

logger = logging.getLogger(__name__)


class Board:
    """TensorBoard's writer. Without the package, or on a full disk, it does nothing: the JSON lines stay."""

    def __init__(self, folder: Path, start: int) -> None:
        self._writer: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self._try(lambda: setattr(self, "_writer", SummaryWriter(str(folder), purge_step=start + 1 if start else None)))

    def scalars(self, step: int, figures: Mapping[str, float]) -> None:
        """One point for each figure."""

        def write() -> None:
            for name, value in figures.items():
                self._writer.add_scalar(name, value, step)

        if self._writer is not None:
            self._try(write)

    def rollouts(self, step: int, samples: Sequence[Sample], grid: Image.Image) -> None:
        """The grid of images, and the texts with their rewards as a table."""

        def write() -> None:
            self._writer.add_image("rollouts/images", np.asarray(grid), step, dataformats="HWC")
            self._writer.add_text("rollouts/texts", text_table(samples), step)

        if self._writer is not None:
            self._try(write)

    def close(self) -> None:
        """Flushes and ends the events file."""
        if self._writer is not None:
            self._try(self._writer.close)

    def _try(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except OSError as error:
            logger.warning("TensorBoard events are no longer written: %s", error)
            self._writer = None


def text_table(samples: Sequence[Sample]) -> str:
    """Markdown: a row for each rollout."""

    def cell(text: str) -> str:
        return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")

    rows = [f"| {s.group + 1} | {s.reward:.3f} | {cell(s.prompt)} | {cell(s.text)} |" for s in samples]
    return "\n".join(["| group | reward | prompt | text |", "| --- | --- | --- | --- |", *rows])
