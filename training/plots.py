"""Pictures of runs: curves from metrics.jsonl, results as dots with their range."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mindomni_rt.errors import MissingExtraError

CURVES = {"pretrain": ("loss/flow", "flow loss"), "sft": ("loss/flow", "flow loss"), "rgpo": ("reward/total", "reward")}
EVALUATED = {"pretrain": "captions/image", "sft": "riddles/image", "rgpo": "riddles/image"}
COLUMNS = ("text", "image", "direct", "caption")


def read_metrics(path: Path) -> dict[str, list[float]]:
    """Columns of a metrics.jsonl; figures that were none are NaN."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    names = dict.fromkeys(n for r in rows for n in r)
    return {n: [r[n] if r.get(n) is not None else float("nan") for r in rows] for n in names}


def smooth(values: Sequence[float], window: int) -> list[float]:
    """A running mean over up to `window` values behind each."""
    sums = np.cumsum([0.0, *values])
    return [float((sums[i + 1] - sums[max(0, i + 1 - window)]) / min(i + 1, window)) for i in range(len(values))]


def plot_study(study: str, rows: Sequence[dict[str, Any]], out: Path, base: Path) -> None:
    """A study's curves (every seed a thin line) beside its results, to out/STUDY.png.

    Curves are read from the arms' runs below `out`, or from the base run. Raises MissingExtraError without matplotlib.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise MissingExtraError("matplotlib", "train") from error
    from .ablate import slug

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(14, 3.8), layout="constrained")
    names = list(dict.fromkeys(r["arm"] for r in rows))
    colours = [pyplot.get_cmap("viridis")(x) for x in np.linspace(0.05, 0.9, max(2, len(names)))]
    label = evaluated = ""
    for name, colour in zip(names, colours, strict=False):
        for index, row in enumerate(r for r in rows if r["arm"] == name):
            own = out / slug(study) / slug(name) / str(row["seed"])
            folder = (base if row.get("of_base") else own) / str(row.get("stage"))
            title = name if not index else None
            if (folder / "metrics.jsonl").exists():
                column, label = CURVES[row["stage"]]
                metrics = read_metrics(folder / "metrics.jsonl")
                shown = smooth(metrics[column], max(1, len(metrics["step"]) // 12))
                left.plot(metrics["step"], shown, color=colour, lw=1.2, label=title)
            if (folder / "evaluation.jsonl").exists():
                evaluated = EVALUATED[row["stage"]]
                figures = read_metrics(folder / "evaluation.jsonl")
                percent = 100 * np.array(figures[evaluated])
                middle.plot(figures["step"], percent, "o-", color=colour, lw=1.2, ms=3, label=title)
    left.set(xlabel="step", ylabel=label, title=study)
    middle.set(xlabel="step", ylabel=f"{evaluated} right, %", ylim=(-3, 103), title="during the run")
    if label:
        left.legend(fontsize=7)
    if label == "flow loss":
        left.set_yscale("log")
    for place, (name, colour) in enumerate(zip(names, colours, strict=False)):
        mine = [r for r in rows if r["arm"] == name]
        for at, column in enumerate(COLUMNS):
            values = [100 * r[column] for r in mine]
            x = at + (place - (len(names) - 1) / 2) * 0.8 / max(1, len(names))
            right.plot([x, x], [min(values), max(values)], color=colour, lw=2)
            right.plot(x, np.mean(values), "o", color=colour, ms=5, label=name if not at else None)
    right.set(
        xticks=range(len(COLUMNS)), xticklabels=COLUMNS, ylim=(-3, 103), ylabel="right, %", title="held out, by seed"
    )
    right.grid(axis="y", alpha=0.3)
    right.legend(fontsize=7)
    figure.savefig(out / f"{slug(study)}.png", dpi=110)
    pyplot.close(figure)
