"""What every plot shares: colours, a headless figure, plain ticks, an atomic save."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from .errors import MissingExtraError
from .files import replace_file

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe-Ito: readable when colour-blind


def blank_figure(width: float, height: float, extra: str = "bench") -> Any:
    """An empty figure, in inches, without any display. Raises MissingExtraError, which names `extra`."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", extra) from error
    return Figure(figsize=(width, height), layout="constrained")


def new_figure(width: float, height: float) -> tuple[Any, Any]:
    """A figure and its one pair of axes."""
    figure = blank_figure(width, height)
    axes = figure.subplots()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


Steps = tuple[int, ...]


def log_axis(axes: Any, side: str = "x", near: Steps = (1, 2, 4, 6), far: Steps = (1, 2, 5)) -> None:
    """A logarithmic axis with plain numbers at these multiples of a power of ten: 40, 60, 100, not 4×10¹.

    far: over more than two decades, so that labels do not run into each other.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set(**{f"{side}scale": "log"})  # before the limits are asked for
    axis, (low, high) = getattr(axes, f"{side}axis"), getattr(axes, f"get_{side}lim")()
    axis.set_major_locator(LogLocator(subs=far if low > 0 and math.log10(high / low) > 2 else near, numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def save(figure: Any, path: Path, dpi: int = 150) -> None:
    """Writes a PNG, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda temporary: figure.savefig(temporary, format="png", dpi=dpi))
