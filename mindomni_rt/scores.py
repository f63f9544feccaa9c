"""Shares of right answers with confidence intervals."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from .errors import BadRequestError


@dataclass(frozen=True, kw_only=True)
class Score:
    """right of n, and the Wilson 95 % interval of the share."""

    right: int
    n: int

    @property
    def share(self) -> float:
        return self.right / self.n

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.right, self.n)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able data."""
        return {**asdict(self), "share": round(self.share, 4), "interval": [round(x, 4) for x in self.interval]}


def wilson(right: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson score interval of a share. Source: E. B. Wilson, J. Am. Stat. Assoc. 22 (1927)."""
    if n < 1:
        raise BadRequestError("an interval needs at least one trial")
    p = right / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)
