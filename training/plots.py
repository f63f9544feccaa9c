"""Pictures of runs: curves from metrics.jsonl, results as dots with their range."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mindomni_rt.errors import MissingExtraError

CURVES = {
    "pretrain": (("loss/flow", "flow loss"),),
    "sft": (("loss/flow", "flow loss"),),
    "rgpo": (("reward/total", "reward"), ("loss/kl_image", "image KL, per token"), ("loss/kl_text", "text KL")),
}
LOGARITHMIC = ("flow loss", "image KL, per token", "text KL")
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


def plot_study(study: str, rows: Sequence[dict[str, Any]], out: Path) -> None:
    """A study's curves (every seed a thin line) beside its results, to out/STUDY.png.

    rows: results of `run_arm`, whose `run` names the folder of the curves. Raises MissingExtraError without matplotlib.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise MissingExtraError("matplotlib", "train") from error
    from .ablate import slug

    stages = [r["stage"] for r in rows if r.get("stage")]
    curves = CURVES[stages[0]] if stages else ()
    width = 4 if len(curves) > 1 else 4.7
    figure, panels = pyplot.subplots(1, len(curves) + 2, figsize=(width * (len(curves) + 2), 3.8), layout="constrained")
    *lefts, middle, right = panels
    names = list(dict.fromkeys(r["arm"] for r in rows))
    colours = [pyplot.get_cmap("turbo")(x) for x in np.linspace(0.05, 0.9, max(2, len(names)))]
    evaluated = ""
    for name, colour in zip(names, colours, strict=False):
        for index, row in enumerate(r for r in rows if r["arm"] == name):
            if not row.get("stage"):
                continue
            folder, title = Path(row["run"]), name if not index else None
            if (folder / "metrics.jsonl").exists():
                metrics = read_metrics(folder / "metrics.jsonl")
                for panel, (column, _) in zip(lefts, CURVES[row["stage"]], strict=False):
                    shown = smooth(metrics.get(column, []), max(1, len(metrics["step"]) // 12))
                    panel.plot(metrics["step"][: len(shown)], shown, color=colour, lw=1, alpha=0.8, label=title)
            if (folder / "evaluation.jsonl").exists():
                evaluated = EVALUATED[row["stage"]]
                figures = read_metrics(folder / "evaluation.jsonl")
                percent = 100 * np.array(figures[evaluated])
                middle.plot(figures["step"], percent, "o-", color=colour, lw=1, ms=3, alpha=0.8, label=title)
    for panel, (_, label) in zip(lefts, curves, strict=True):
        panel.set(xlabel="step", ylabel=label, yscale="log" if label in LOGARITHMIC else "linear")
    panels[0].set_title(study)
    middle.set(xlabel="step", ylabel=f"{evaluated} right, %", ylim=(-3, 103), title="during the run")
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
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=len(names), fontsize=8)
    figure.savefig(out / f"{slug(study)}.png", dpi=110)
    pyplot.close(figure)
