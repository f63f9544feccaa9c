"""Ours against a peer's: outputs first, then times in turn, A B A B, so that both meet the same machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from ..compare import change
from ..gpu.measure import Meter

Sample = Callable[[Meter], float]
"""One measurement: seconds."""
BOUNDS = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 2e-2}


@dataclass(frozen=True, kw_only=True)
class Match:
    """How far two outputs are apart. error: ‖peer − ours‖ / ‖ours‖; tokens_equal: None where it is not asked."""

    error: float
    bound: float
    tokens_equal: bool | None = None

    @property
    def agrees(self) -> bool:
        """Within the bound (a NaN is not), and the same text where that is asked."""
        return self.error < self.bound and self.tokens_equal is not False


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The same work twice. rate: what a sample is one of, where a rate is usual ("tokens/s")."""

    name: str
    ours: Sample
    theirs: Sample
    rate: str = ""


@dataclass(frozen=True, kw_only=True)
class Group:
    """What is compared with one peer: whether outputs match, then the pairs to time. note: what a reader must know."""

    peer: str
    match: Match
    pairs: Sequence[Pair]
    note: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


def timed(run: Callable[[], Any], parts: int = 1) -> Sample:
    """Seconds of a run, or of one of its equal parts."""
    return lambda meter: meter.once(run)[0] / parts


def after_first(run: Callable[[Callable[[], None]], Any], parts: int) -> Sample:
    """Seconds of each of the `parts` that follow the moment at which the run calls what it is given."""

    def sample(meter: Meter) -> float:
        began: list[float] = []
        meter.wait()
        run(lambda: began.append(time.perf_counter()))
        meter.wait()
        return (time.perf_counter() - began[0]) / parts

    return sample


def read(tokens: Iterable[int], mark: Callable[[], None]) -> list[int]:
    """All tokens; calls `mark` when the first is there."""
    text: list[int] = []
    for token in tokens:
        if not text:
            mark()
        text.append(token)
    return text


def interleave(pair: Pair, meter: Meter, runs: int, warmup: int) -> dict[str, Any]:
    """Times of both, and peer / ours: the median over runs with its 95 % bootstrap interval. Above 1 ours is faster."""
    for _ in range(warmup):
        pair.ours(meter)
        pair.theirs(meter)
    ours, theirs = [], []
    for _ in range(runs):
        ours.append(pair.ours(meter))
        theirs.append(pair.theirs(meter))
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    found = change(pair.name, [1.0], ratios)
    out: dict[str, Any] = {"n": runs, "warmup": warmup, "ratio": found.ratio, "low": found.low, "high": found.high}
    if pair.rate:
        out["rates"] = {"of": pair.rate, "ours": 1 / median(ours), "theirs": 1 / median(theirs)}
    return {**out, "ours_s": ours, "theirs_s": theirs}


def run_group(group: Group, meter: Meter, runs: int, warmup: int) -> dict[str, Any]:
    """A group's record. Outputs that disagree are not timed: a ratio of different results means nothing."""
    match = group.match
    found: dict[str, Any] = {
        "peer": group.peer,
        "error": match.error,
        "bound": match.bound,
        "tokens_equal": match.tokens_equal,
        "agrees": match.agrees,
        "note": group.note,
        **group.extra,
    }
    if match.agrees:
        found["pairs"] = {pair.name: interleave(pair, meter, runs, warmup) for pair in group.pairs}
    return found
