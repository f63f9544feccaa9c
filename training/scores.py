"""Scores pooled over seeds and compared with a record."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mindomni_rt.scores import Score


def pool(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Scores of several seeds as one: counts added up, other figures averaged."""
    out: dict[str, Any] = {}
    for suite, scores in found[0].items():
        out[suite] = {}
        for name, value in scores.items():
            each = [f[suite][name] for f in found]
            if isinstance(value, dict):
                out[suite][name] = Score(right=sum(e["right"] for e in each), n=sum(e["n"] for e in each)).to_dict()
            else:
                out[suite][name] = round(float(np.mean(each)), 4)
    return out


def departures(found: dict[str, Any], record: dict[str, Any]) -> list[str]:
    """Where scores leave a record: lines for those whose 95 % intervals do not even touch the recorded ones."""
    lines = []
    for suite, scores in found.items():
        for name, value in scores.items():
            before = record.get(suite, {}).get(name)
            if isinstance(value, dict) and before is not None:
                (low, high), (least, most) = value["interval"], before["interval"]
                if low > most or high < least:
                    lines.append(
                        f"{suite} {name}: {value['share']:.3f} ({low:.3f} to {high:.3f}), "
                        f"recorded {before['share']:.3f} ({least:.3f} to {most:.3f})"
                    )
    return lines


def table(found: dict[str, Any]) -> str:
    """Scores as aligned text."""
    lines = [f"{'suite':10} {'score':24} {'share':>7}  95 % interval       n"]
    for suite, scores in found.items():
        for name, value in scores.items():
            if isinstance(value, dict):
                low, high = value["interval"]
                lines.append(f"{suite:10} {name:24} {value['share']:7.3f}  {low:.3f} to {high:.3f}  {value['n']:6}")
            else:
                lines.append(f"{suite:10} {name:24} {value:7.3f}")
    return "\n".join(lines)
