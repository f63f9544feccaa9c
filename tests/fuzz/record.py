"""Counts of outcomes by target and kind of mutation, with what is needed to repeat them."""

from __future__ import annotations

import json
import platform
import subprocess
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .mutants import kinds
from .runner import BYTES, FAILURES, OUTCOMES, SECONDS, WALL, Outcome

PATH = Path(__file__).with_name("record.json")
LIBRARIES = ("torch", "onnxruntime", "tokenizers", "safetensors", "jinja2", "pillow", "numpy", "onnx")


class Journal:
    """A file with a line for each mutant that ran. A run that was stopped goes on where it was; failures run again."""

    def __init__(self, path: Path) -> None:
        self._path, self._commit = path, commit()
        self.done: dict[int, tuple[str, Outcome]] = {}
        for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            data = json.loads(text)
            code, one = data.pop("commit"), Outcome(**data)
            self.done[one.number] = code, one

    def add(self, one: Outcome) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"commit": self._commit, **asdict(one)}) + "\n")
        self.done[one.number] = self._commit, one

    def left(self, numbers: Iterable[int]) -> list[int]:
        """Those that have not run yet, or failed."""
        return [n for n in numbers if n not in self.done or self.done[n][1].outcome in FAILURES]


def make_record(journal: Journal) -> dict[str, Any]:
    """The record as JSON data."""
    found = [one for _, one in journal.done.values()]
    table: dict[str, Counter[str]] = {name: Counter() for name in kinds()}
    for one in found:
        table[f"{one.target}, {one.kind}"][one.outcome] += 1
    totals = Counter(one.outcome for one in found)
    return {
        "mutants": len(found),
        "seed": sorted({one.seed for one in found}),
        "limits": {"processor_seconds": SECONDS, "seconds": WALL, "bytes": BYTES},
        "commits": dict(Counter(code for code, _ in journal.done.values())),
        "date": datetime.now(UTC).date().isoformat(),
        "processor_seconds": round(sum(one.seconds for one in found)),
        "slowest": max((one.seconds for one in found), default=0.0),
        "largest": max((one.peak for one in found), default=0),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "versions": {name: version(name) for name in LIBRARIES},
        "outcomes": {name: totals[name] for name in OUTCOMES},
        "by_kind": {name: {o: counts[o] for o in OUTCOMES if counts[o]} for name, counts in table.items()},
        "failures": [line(one) for one in found if one.outcome in FAILURES],
    }


def line(one: Outcome) -> str:
    """One mutant in a line."""
    text = f"{one.seed}/{one.number} {one.outcome}: {one.target}, {one.kind} of {one.source}: {one.note}: {one.detail}"
    return text.encode("unicode_escape").decode("ascii")[:500]


def write(record: dict[str, Any]) -> None:
    PATH.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def commit() -> str:
    """The commit that is checked out."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=PATH.parent)
    return done.stdout.strip() or "unknown"
