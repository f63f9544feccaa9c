"""What every plot of this package shares: colours, a headless figure, plain ticks, an atomic save."""

from __future__ import annotations

import io
import math
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


def log_axis(axes: Any) -> None:
    """A logarithmic x axis with plain numbers at 1, 2, 4, 6 and 10 times a power of ten: 40, 60, 100, not 4×10¹.

    Over more than two decades 4 and 6 are left out, so that labels do not run into each other.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")  # before the limits are asked for
    low, high = axes.get_xlim()
    wide = low > 0 and math.log10(high / low) > 2
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if wide else (1, 2, 4, 6)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def save(figure: Any, path: Path) -> None:
    """Writes a PNG, whole or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_atomic(path, buffer.getvalue())
