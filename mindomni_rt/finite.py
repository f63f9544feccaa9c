"""Where a NaN came from: each stage's result is looked at once."""

from __future__ import annotations

from typing import Any

import numpy as np

from .errors import NotFiniteError


def check_finite(stage: str, values: Any, dtype: str = "") -> None:
    """Raises NotFiniteError naming the stage if an array or tensor holds NaN or infinity.

    values: numpy's or torch's; a tensor is looked at on its device, which waits for it. dtype: what the stage computed
    in, for the message.
    """
    finite = values.isfinite().all() if hasattr(values, "isfinite") else np.isfinite(values).all()
    if not bool(finite):
        inside = f" in {dtype}" if dtype else ""
        raise NotFiniteError(
            f"stage {stage} gave numbers that are not finite{inside}: its weights are damaged or too large for it. "
            "Load the model with dtype='float32', or download it again"
        )
