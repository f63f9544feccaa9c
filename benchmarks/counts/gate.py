"""How `compare` compares two counts results: counts do not vary between runs, so any rise is a failure."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindomni_rt.errors import BadRequestError

from ..results import read_checked

THRESHOLD = 0.0
EVERYWHERE = ("flops", "nodes", "weight_bytes")
"""What no release of PyTorch changes. Operators and their memory may differ between its minor versions."""


@dataclass(frozen=True, kw_only=True)
class Rise:
    """Of one count: before and after."""

    metric: str
    a: int
    b: int

    def worse(self, threshold: float) -> bool:
        """Whether b is more than a by more than a share of it."""
        return self.b > self.a * (1 + threshold)

    def verdict(self, threshold: float) -> str:
        """In a word."""
        if self.worse(threshold):
            return "MORE"
        return "less" if self.b < self.a else "same"


def read_counts(path: Path) -> dict[str, Any]:
    """A counts result, or BadRequestError that says what is wrong with it."""
    return read_checked(path, "counts")


def _shapes(result: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration without what no count follows from."""
    return {k: v for k, v in result["model"]["config"].items() if k != "recommended"}


def rises(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[list[Rise], list[str]]:
    """Every count of a beside that of b, and what was not compared and why.

    Raises BadRequestError where they counted different requests or b lacks a stage.
    """
    for key, one, other in (
        ("configurations", _shapes(a), _shapes(b)),
        ("requests", a["request"], b["request"]),
    ):
        if one != other:
            raise BadRequestError(f"the two counted different {key}; expected the same model and request")
    same_torch, notes, found = a["torch"] == b["torch"], list[str](), list[Rise]()
    if not same_torch:
        notes.append(f"operators and bytes are not compared: torch {a['torch']} and {b['torch']}; operations are")
    for part in ("stages", "graphs"):
        if part == "graphs" and not (a[part] and b[part] and a["bundle"] == b["bundle"]):
            notes.append("graphs are not compared: one result has none, or those of another bundle")
            continue
        lacking = sorted(set(a[part]) - set(b[part]))
        if lacking:
            raise BadRequestError(f"the second result lacks {part} {', '.join(lacking)}; expected all of the first")
        notes += [f"{name} is new among the {part}" for name in sorted(set(b[part]) - set(a[part]))]
        for name, counts in a[part].items():
            found += [
                Rise(metric=f"{part.removesuffix('s')} {name} {metric}", a=value, b=int(b[part][name].get(metric, 0)))
                for metric, value in counts.items()
                if metric != "units" and (same_torch or metric in EVERYWHERE)
            ]
    return found, notes


def more_operators(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Which operators a stage runs more often: a hint where to look."""
    return [
        f"stage {stage}: {name} {a['operators'].get(stage, {}).get(name, 0)} -> {count}"
        for stage, by_name in b["operators"].items()
        for name, count in by_name.items()
        if count > a["operators"].get(stage, {}).get(name, 0)
    ]


def run_gate(first: Path, second: Path, threshold: float | None) -> int:
    """Prints what changed; 1 if any count rose by more than the threshold."""
    a, b = read_counts(first), read_counts(second)
    allowed = THRESHOLD if threshold is None else threshold
    found, notes = rises(a, b)
    lines = [f"note: {note}" for note in notes]
    changed = [r for r in found if r.a != r.b]
    lines.append(f"{len(found)} counts compared, {len(found) - len(changed)} the same")
    for r in changed:
        share = f"{r.b / r.a - 1:+8.2%}" if r.a else "     new"
        lines.append(f"{r.metric:36} {r.a:>14} {r.b:>14} {share}  {r.verdict(allowed)}")
    failed = any(r.worse(allowed) for r in found)
    if failed:
        lines += more_operators(a, b) if a["torch"] == b["torch"] else []
        lines.append(f"where the rise is meant, renew the baseline: python -m benchmarks counts --out {first}")
    sys.stdout.write("\n".join(lines) + "\n")
    return int(failed)
