"""How far a picture or its latents are from those of another run."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def psnr(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    """Decibels, for pixels in [0, 1]; equal pictures give 100."""
    error = float(np.mean((found.astype(np.float64) - wanted) ** 2))
    return min(100.0, -10 * np.log10(error)) if error > 0 else 100.0


def cosine(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Of two arrays of one shape."""
    x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    return float(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)))
