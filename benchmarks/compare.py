"""`python -m benchmarks compare A.json B.json`: what changed between two results of one kind, latency or counts.

Times scatter, so of latency it says how sure the change is; counts do not (`gate`).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from mindomni_rt.errors import BadRequestError

from .counts import gate
from .results import Result, read_json, read_result

_DRAWS = 4000
THRESHOLD = 0.05


@dataclass(frozen=True, kw_only=True)
class Change:
    """Of one metric: medians, their ratio b / a, and its 95 % bootstrap interval over runs."""

    metric: str
    a: float
    b: float
    ratio: float
    low: float
    high: float

    def worse(self, threshold: float) -> bool:
        """Whether b is slower by more than the threshold, the interval's lower end included."""
        return self.low > 1 + threshold

    def verdict(self, threshold: float) -> str:
        """In a word."""
        if self.worse(threshold):
            return "SLOWER"
        return "faster" if self.high < 1 / (1 + threshold) else "same"


def change(metric: str, a: Sequence[float], b: Sequence[float], seed: int = 0) -> Change:
    """Compares samples; a result of a single run has no spread, which the interval then does not show."""
    draw = np.random.default_rng(seed)
    first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)
    ratios = np.median(draw.choice(second, (_DRAWS, len(second))), axis=1) / np.median(
        draw.choice(first, (_DRAWS, len(first))), axis=1
    )
    low, high = np.percentile(ratios, (2.5, 97.5))
    middle = float(np.median(first)), float(np.median(second))
    return Change(
        metric=metric, a=middle[0], b=middle[1], ratio=middle[1] / middle[0], low=float(low), high=float(high)
    )


def compare(a: Result, b: Result) -> list[Change]:
    """Changes of every metric that both have. Raises BadRequestError if they measured different requests."""
    if a.workload != b.workload:
        first, second = asdict(a.workload), asdict(b.workload)
        differ = ", ".join(f"{k} {first[k]} and {second[k]}" for k in first if first[k] != second[k])
        raise BadRequestError(f"{a.path} and {b.path} measured different requests: {differ}")
    shared = [m for m in a.metrics if m in b.metrics and min(a.samples(m)) > 0]
    if not shared:
        raise BadRequestError(f"{a.path} and {b.path} have no metric in common")
    return [change(m, a.samples(m), b.samples(m)) for m in shared]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("a", type=Path, help="the earlier result")
    parser.add_argument("b", type=Path, help="the later result")
    parser.add_argument(
        "--threshold",
        type=float,
        help=f"share from which more is a failure; default: {THRESHOLD} of time, {gate.THRESHOLD:g} of counts",
    )


def run(options: argparse.Namespace) -> int:
    """Prints the table; 1 if anything got worse by more than the threshold."""
    if options.threshold is not None and options.threshold < 0:
        raise BadRequestError(f"--threshold {options.threshold}: expected 0 or more")
    kinds = [_kind(path) for path in (options.a, options.b)]
    if "counts" in kinds:
        if kinds[0] != kinds[1]:
            names = " and ".join(f"{path} ({kind})" for path, kind in zip((options.a, options.b), kinds, strict=True))
            raise BadRequestError(f"{names}: expected two results of one kind")
        return gate.run_gate(options.a, options.b, options.threshold)
    threshold = THRESHOLD if options.threshold is None else options.threshold
    a, b = read_result(options.a), read_result(options.b)
    if a.machine != b.machine:
        print(f"note: different machines, {a.machine} and {b.machine}")
    found = compare(a, b)
    print(f"{'metric':12} {'A s':>10} {'B s':>10} {'B / A':>7}  95 % interval    verdict")
    for c in found:
        verdict = c.verdict(threshold)
        print(f"{c.metric:12} {c.a:10.4f} {c.b:10.4f} {c.ratio:7.3f}  {c.low:.3f} to {c.high:.3f}   {verdict}")
    return int(any(c.worse(threshold) for c in found))


def _kind(path: Path) -> str | None:
    data = read_json(path)
    return data.get("kind") if isinstance(data, dict) else None
