"""Run logs: metrics, TensorBoard events, configuration, commit, rollouts, and the progress bar."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

import mindomni_rt
from mindomni_rt.checkout import commit
from mindomni_rt.files import write_text

from ..config import Config
from ..errors import BadConfigError, StorageError
from ..stages.base import Sample
from .board import Board
from .rollout_dump import dump_rollouts


class Log:
    """The log of one run, appended to when it resumes at step `start`; only the first process of several writes.

    Lines of steps after the resumed checkpoint are removed, so that each step has one line.
    """

    def __init__(self, config: Config, start: int, writes: bool = True, bar: bool = True) -> None:
        self._writes = writes
        self._bar: Any = None
        self.path = Path(config.out) / "metrics.jsonl"
        self._evaluations = self.path.with_name("evaluation.jsonl")
        if not writes:
            return
        configuration, runs = (self.path.with_name(name) for name in ("config.json", "runs.jsonl"))
        if configuration.exists() and not runs.exists():
            raise BadConfigError(
                f"out = {config.out!r} holds {configuration.name}, which is not of a run: choose another out"
            )
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _cut(self.path, start)
            _cut(self._evaluations, start)
            record = {
                "config": config.to_dict(),
                "commit": commit() or "unknown",
                "version": mindomni_rt.__version__,
                "torch": torch.__version__,
                "python": sys.version.split()[0],
                "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "from_step": start,
            }
            with runs.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            write_text(configuration, json.dumps(config.to_dict(), indent=2) + "\n")
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise StorageError(f"log {self.path} cannot be written: {error.strerror or error}") from error
        self._board = Board(Path(config.out) / "tensorboard", start)
        if bar:
            from tqdm import tqdm

            self._bar = tqdm(
                total=config.optim.steps, initial=start, desc=config.stage, unit="step", mininterval=2.0, smoothing=0.05
            )

    def write(self, step: int, figures: Mapping[str, float], show: tuple[str, ...] = ()) -> None:
        """One line of figures for a step; NaN and infinity are written as null."""
        if not self._writes:
            return
        line = {"step": step, **{k: round(v, 8) if math.isfinite(v) else None for k, v in figures.items()}}
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except OSError as error:
            raise StorageError(f"log {self.path} cannot be written: {error.strerror or error}") from error
        self._board.scalars(step, figures)
        if self._bar is not None:
            shown = {n: f"{figures[n]:.4g}" for n in show if n in figures}
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(step - self._bar.n)

    def evaluation(self, step: int, figures: Mapping[str, float]) -> None:
        """One line in evaluation.jsonl."""
        if not self._writes:
            return
        line = {"step": step, **{k: round(v, 6) for k, v in figures.items()}}
        try:
            with self._evaluations.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise StorageError(f"log {self._evaluations} cannot be written: {error.strerror or error}") from error
        self._board.scalars(step, {f"evaluation/{name}": value for name, value in figures.items()})
        if self._bar is not None:
            shown = " ".join(f"{name} {value:.3f}" for name, value in figures.items())
            self._bar.write(f"step {step}: {shown}", file=sys.stderr)

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Rollouts of a step: texts and rewards as JSON lines and in TensorBoard, images as a labelled grid."""
        if not self._writes:
            return
        self._board.rollouts(step, samples, dump_rollouts(self.path.parent / "rollouts", step, samples))

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if not self._writes:
            return
        with contextlib.suppress(OSError):  # each line was flushed when it was written, and errors raised there
            self._file.close()
        self._board.close()
        if self._bar is not None:
            self._bar.close()


def _cut(path: Path, start: int) -> None:
    """Removes the lines after step `start`."""
    if not path.is_file():  # or a device, which has no lines
        return
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= start:
                lines.append(line)
        except (json.JSONDecodeError, KeyError):
            continue  # a half-written last line
    write_text(path, "".join(f"{line}\n" for line in lines))
