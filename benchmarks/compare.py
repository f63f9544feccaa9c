"""`mindomni bench compare A.json B.json`: what changed between two results of one kind, latency or counts.

Times scatter, so of latency it says how sure the change is. Counts do not: any rise is a failure.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mindomni_rt.errors import BadRequestError

from .results import Result, read_checked, read_json

_DRAWS = 4000
THRESHOLDS = {"latency": 0.05, "counts": 0.0}
EVERYWHERE = ("flops", "nodes", "weight_bytes")
"""Counts that no release of PyTorch changes. Operators and their memory may differ between its minor versions."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """Of one metric: medians, their ratio b / a, and its 95 % bootstrap interval over runs; of a count no interval."""

    metric: str
    a: float
    b: float
    ratio: float
    low: float
    high: float
    words: tuple[str, str] = ("SLOWER", "faster")

    def worse(self, threshold: float) -> bool:
        """Whether b is more by more than the threshold, the interval's lower end included."""
        return self.low > 1 + threshold

    def verdict(self, threshold: float) -> str:
        """In a word."""
        if self.worse(threshold):
            return self.words[0]
        return self.words[1] if self.high < 1 / (1 + threshold) else "same"

    def line(self, threshold: float) -> str:
        """The row of the table."""
        sure = f"  95 %: {self.low - 1:+.2%} to {self.high - 1:+.2%}" if self.low < self.high else ""
        a, b = (f"{value:.4f}" if isinstance(value, float) else value for value in (self.a, self.b))
        return f"{self.metric:36} {a:>14} {b:>14} {self.ratio - 1:+8.2%}  {self.verdict(threshold)}{sure}"


def change(metric: str, a: Sequence[float], b: Sequence[float], seed: int = 0) -> Change:
    """Compares samples; a result of a single run has no spread, which the interval then does not show."""
    draw = np.random.default_rng(seed)
    first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)
    ratios = np.median(draw.choice(second, (_DRAWS, len(second))), axis=1) / np.median(
        draw.choice(first, (_DRAWS, len(first))), axis=1
    )
    low, high = (float(end) for end in np.percentile(ratios, (2.5, 97.5)))
    before, after = float(np.median(first)), float(np.median(second))
    return Change(metric=metric, a=before, b=after, ratio=after / before, low=low, high=high)


def latency_changes(a: Result, b: Result) -> tuple[list[Change], list[str]]:
    """Changes of every metric that both have, and notes. BadRequestError if they measured different requests."""
    if a.workload != b.workload:
        first, second = asdict(a.workload), asdict(b.workload)
        differ = ", ".join(f"{k} {_word(v)} and {_word(second[k])}" for k, v in first.items() if v != second[k])
        raise BadRequestError(f"{a.path} and {b.path} measured different requests: {differ}")
    metrics = dict.fromkeys(name for run in a.data["runs"] for name in run)
    shared = [m for m in metrics if b.samples(m) and min(a.samples(m)) > 0]
    if not shared:
        raise BadRequestError(f"{a.path} and {b.path} have no metric in common")
    notes = [f"different machines, {a.machine} and {b.machine}"] if a.machine != b.machine else []
    return [change(m, a.samples(m), b.samples(m)) for m in shared], notes


def _word(value: object) -> str:
    """A field of `Workload` for a reader: rows and columns as 12x14, a flag as yes or no."""
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return ("no", "yes")[value] if isinstance(value, bool) else str(value)


def count_changes(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[list[Change], list[str]]:
    """Every count of a beside that of b, and what was not compared and why.

    Raises BadRequestError where they counted different requests or b lacks a stage.
    """
    # No count follows from what is recommended.
    shapes = [{k: v for k, v in r["model"]["config"].items() if k != "recommended"} for r in (a, b)]
    for key, one, other in (("configurations", *shapes), ("requests", a["request"], b["request"])):
        if one != other:
            raise BadRequestError(f"the two counted different {key}; expected the same model and request")
    same_torch, notes, found = a["torch"] == b["torch"], list[str](), list[Change]()
    if not same_torch:
        notes.append(f"operators and bytes are not compared: torch {a['torch']} and {b['torch']}; operations are")
    for part in ("stages", "graphs"):
        if part == "graphs" and not (a[part] and b[part] and a["bundle"] == b["bundle"]):
            notes.append("graphs are not compared: one result has none, or those of another bundle")
            continue
        if lacking := sorted(set(a[part]) - set(b[part])):
            raise BadRequestError(f"the second result lacks {part} {', '.join(lacking)}; expected all of the first")
        notes += [f"{name} is new among the {part}" for name in sorted(set(b[part]) - set(a[part]))]
        for name, counts in a[part].items():
            for metric, before in counts.items():
                if metric != "units" and (same_torch or metric in EVERYWHERE):
                    after = int(b[part][name].get(metric, 0))
                    ratio = after / before if before else float("inf") if after else 1.0
                    title, ends = f"{part.removesuffix('s')} {name} {metric}", {"low": ratio, "high": ratio}
                    found.append(Change(metric=title, a=before, b=after, ratio=ratio, **ends, words=("MORE", "less")))
    return found, notes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("a", type=Path, help="the earlier result")
    parser.add_argument("b", type=Path, help="the later result")
    default = f"{THRESHOLDS['latency']} of time, {THRESHOLDS['counts']:g} of counts"
    parser.add_argument("--threshold", type=float, help=f"share from which more is a failure; default: {default}")


def run(options: argparse.Namespace) -> int:
    """Prints what changed; 1 if anything got worse by more than the threshold."""
    if options.threshold is not None and options.threshold < 0:
        raise BadRequestError(f"--threshold {options.threshold}: expected 0 or more")
    paths = (options.a, options.b)
    kinds = [data.get("kind") if isinstance(data := read_json(path), dict) else None for path in paths]
    if "counts" in kinds and kinds[0] != kinds[1]:
        names = " and ".join(f"{path} ({kind or 'of no kind'})" for path, kind in zip(paths, kinds, strict=True))
        raise BadRequestError(f"{names}: expected two results of one kind")
    kind = "counts" if "counts" in kinds else "latency"
    threshold = THRESHOLDS[kind] if options.threshold is None else options.threshold
    counts, (a, b) = kind == "counts", (read_checked(path, kind) for path in paths)
    found, notes = count_changes(a, b) if counts else latency_changes(Result(options.a, a), Result(options.b, b))
    changed = [c for c in found if c.a != c.b or c.low < c.high]
    lines = [f"note: {note}" for note in notes]
    if counts:
        lines.append(f"{len(found)} counts compared, {len(found) - len(changed)} the same")
    else:
        lines.append(f"{len(found)} times compared; same: the interval reaches within {threshold:.0%}")
    lines += [c.line(threshold) for c in changed]
    failed = any(c.worse(threshold) for c in found)
    if counts and failed:
        lines += [  # where to look: operators that a stage runs more often
            f"stage {stage}: {name} {before} -> {count}"
            for stage, by_name in b["operators"].items()
            for name, count in by_name.items()
            if a["torch"] == b["torch"] and count > (before := a["operators"].get(stage, {}).get(name, 0))
        ]
        lines.append(f"where the rise is meant, renew the baseline: mindomni bench counts --out {options.a}")
    sys.stdout.write("\n".join(lines) + "\n")
    return int(failed)
