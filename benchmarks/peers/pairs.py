"""Ours against a peer's: outputs first, then times in turn, A B A B, so that load on the machine affects both."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from mindomni_rt.judgement import described, judged

from ..compare import change
from ..measure import Meter

Sample = Callable[[Meter], float]
"""One measurement: seconds."""
BOUNDS = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 0.1}
"""Of whole models. 16 bits: by rounding of some 30 layers; `judgement.RATIO` is the sharper test there."""
ROUNDED = 1.0
"""Of 8- and 4-bit weights, which err by half in four layers of random ones. It shows that the same model ran, not how
well: unrelated outputs of one size err by 1.4."""


@dataclass(frozen=True, kw_only=True)
class Match:
    """How far our output is from what is right. error: ‖found - right‖ / ‖right‖.

    In float32 the peer's own output is what is right. In 16 bits (exact False) both are held against a float32
    reference: `baseline` is the peer's distance from it. tokens_equal: None where it is not asked.
    """

    error: float
    bound: float
    tokens_equal: bool | None = None
    baseline: float | None = None
    exact: bool = True

    def record(self) -> dict[str, Any]:
        """As `judged`; "agrees": right, and the same text where asked."""
        found = judged(self.error, self.bound, self.baseline)
        agrees = found.pop("right") and self.tokens_equal is not False
        return {**found, "tokens_equal": self.tokens_equal, "agrees": agrees}


@dataclass(frozen=True)
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
    extra: Mapping[str, Any] = field(default_factory=dict)


def timed(run: Callable[[], Any], parts: int = 1) -> Sample:
    """Seconds of a run, or of one of its equal parts."""
    return lambda meter: meter.once(run)[0] / parts


def marked(meter: Meter, run: Callable[[Callable[[], None]], Any], parts: int) -> tuple[float, float]:
    """Seconds until the run calls what it is given, and of each of the `parts` that follow."""
    marks: list[float] = []
    meter.wait()
    began = time.perf_counter()
    run(lambda: marks.append(time.perf_counter()))
    meter.wait()
    return marks[0] - began, (time.perf_counter() - marks[0]) / parts


def after_first(run: Callable[[Callable[[], None]], Any], parts: int) -> Sample:
    """Seconds of each of the `parts` that follow the moment at which the run calls what it is given."""
    return lambda meter: marked(meter, run, parts)[1]


def interleave(pair: Pair, meter: Meter, runs: int, warmup: int) -> dict[str, Any]:
    """Times of both, and peer / ours: the median over runs with its 95 % bootstrap interval. Above 1 ours is faster."""
    times = [(pair.ours(meter), pair.theirs(meter)) for _ in range(warmup + runs)][warmup:]
    ours, theirs = (list(side) for side in zip(*times, strict=True))
    ratios = [b / a for a, b in times]
    found = change(pair.name, [1.0], ratios)
    out: dict[str, Any] = {"n": runs, "warmup": warmup, "ratio": found.ratio, "low": found.low, "high": found.high}
    if pair.rate:
        out["rates"] = {"of": pair.rate, "ours": 1 / median(ours), "theirs": 1 / median(theirs)}
    return {**out, "ours_s": ours, "theirs_s": theirs}


def run_group(group: Group, meter: Meter, runs: int, warmup: int) -> dict[str, Any]:
    """A group's record. A pair that fails is recorded; the others run.

    float32 outputs that disagree are not timed: one of the two computes something else. In 16 bits times are always
    recorded, and `agrees` marks what missed its bound.
    """
    found: dict[str, Any] = {"peer": group.peer, **group.match.record(), "note": group.note, **group.extra}
    if group.match.exact and not found["agrees"]:
        return found
    found["pairs"] = {}
    for pair in group.pairs:
        try:
            found["pairs"][pair.name] = interleave(pair, meter, runs, warmup)
        except Exception as error:  # noqa: BLE001  # a peer of any version, on a GPU that may be too small for both
            found.setdefault("failed_pairs", {})[pair.name] = described(error)
    return found
