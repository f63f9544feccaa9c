"""What every plot of this package shares: colours, a headless figure, an atomic save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mindomni_rt.errors import MissingExtraError

from .results import write_atomic

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe-Ito: readable when colour-blind


def new_figure(width: float, height: float) -> tuple[Any, Any]:
    """A figure and its axes, in inches, without any display."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "bench") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def save(figure: Any, path: Path) -> None:
    """Writes a PNG, whole or not at all."""
    import io

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_atomic(path, buffer.getvalue())
