"""Whether a measured result is right, and what went wrong, in words that fit a record."""

from __future__ import annotations

import math
from typing import Any

from .errors import MindOmniError

RATIO = 1.2
"""How much farther from the float32 reference than the baseline a 16-bit result may be."""


def judged(error: float, bound: float, baseline: float | None = None) -> dict[str, Any]:
    """Whether a result is right: within the bound, and no farther from the reference than RATIO times the baseline.

    error, baseline: distances from the same float32 or float64 reference. None where no baseline rounds alike. Two
    16-bit results are never compared with each other: both may be good and yet differ by twice their distance.
    """
    right = error < bound and (baseline is None or error <= RATIO * baseline)
    return {
        "error": error if math.isfinite(error) else None,
        "bound": bound,
        "baseline_error": baseline,
        "right": right,
    }


def described(error: BaseException) -> str:
    """An error in one line of at most 500 characters."""
    if isinstance(error, MindOmniError):
        return str(error)[:500]
    memory = "out of memory: " if isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__ else ""
    return " ".join(f"{memory}{type(error).__name__}: {error}".split())[:500]
