"""Pictures of runs: curves from metrics.jsonl, results as dots with their range.

`python -m training plot RUN [RUN …] --out FILE.png` shows what runs have logged, a run a row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mindomni_rt.commands import Parser
from mindomni_rt.errors import BadRequestError, MissingExtraError

CURVES = {
    "pretrain": (("loss/flow", "flow loss"),),
    "sft": (("loss/flow", "flow loss"),),
    "rgpo": (("reward/total", "reward"), ("loss/kl_image", "image KL, per token"), ("loss/kl_text", "text KL")),
}
LOGARITHMIC = ("flow loss", "image KL, per token", "text KL")
EVALUATED = {"pretrain": "captions/image", "sft": "riddles/image", "rgpo": "riddles/image"}
COLUMNS = ("text", "image", "direct", "caption")


def read_metrics(path: Path) -> dict[str, list[float]]:
    """Columns of a metrics.jsonl; figures that were none are NaN. Raises BadRequestError where there is no log."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise BadRequestError(f"{path}: expected the log of a run, a JSON object a line ({error})") from error
    names = dict.fromkeys(n for r in rows for n in r)
    return {n: [r[n] if r.get(n) is not None else float("nan") for r in rows] for n in names}


def smooth(values: Sequence[float], window: int) -> list[float]:
    """A running mean over up to `window` values behind each."""
    sums = np.cumsum([0.0, *values])
    return [float((sums[i + 1] - sums[max(0, i + 1 - window)]) / min(i + 1, window)) for i in range(len(values))]


def slug(name: str) -> str:
    """A name as part of a file name: letters and digits in lower case, "-" for the rest."""
    return "".join(c if c.isalnum() else "-" for c in name.lower()).strip("-")


def _pyplot() -> Any:
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise MissingExtraError("matplotlib", "train") from error
    return pyplot


PANELS = {  # title: columns (a pattern of their names), and whether their scale is logarithmic
    "loss terms": (r"loss/(?!policy).*", True),
    "reward": (r"reward/(?!.*_std|zero).*", False),
    "spread within groups": (r"reward/(group_std|zero_std_groups)", False),
    "policy": (r"policy/(entropy|clip_fraction)|completion/(truncated|distinct)", False),
    "gradient norm": (r"grad_norm", True),
}


def plot_runs(runs: Sequence[Path], out: Path) -> None:
    """What each run logged and its evaluations, a row a run, to a PNG. Raises BadRequestError, MissingExtraError."""
    logs = {run: read_metrics(run / "metrics.jsonl") for run in runs}
    pyplot = _pyplot()
    across = 1 + max(sum(any(re.fullmatch(p, c) for c in log) for p, _ in PANELS.values()) for log in logs.values())
    figure, grid = pyplot.subplots(
        len(runs), across, figsize=(3.6 * across, 3.0 * len(runs)), layout="constrained", squeeze=False
    )
    for (run, log), row in zip(logs.items(), grid, strict=True):
        shown = [(title, *rest) for title, rest in PANELS.items() if any(re.fullmatch(rest[0], c) for c in log)]
        for axes, (title, pattern, logarithmic) in zip(row, shown, strict=False):
            for column in sorted(c for c in log if re.fullmatch(pattern, c)):
                window = max(1, len(log["step"]) // 30)
                axes.plot(log["step"], smooth(log[column], window), lw=1.2, label=column.partition("/")[2] or column)
            axes.set(title=title, yscale="log" if logarithmic else "linear")
        held = run / "evaluation.jsonl"
        if held.exists():
            figures = read_metrics(held)
            for column in (c for c in figures if re.fullmatch(r".*/(image|text)", c)):
                row[-1].plot(figures["step"], 100 * np.array(figures[column]), "o-", lw=1.2, ms=3, label=column)
            row[-1].set(title="right, exact, %", ylim=(-3, 103))
        for axes in row:
            if axes.has_data():
                axes.set_xlabel("step")
                axes.legend(fontsize=7)
            else:
                axes.set_axis_off()
        row[0].set_ylabel(run.name)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=100)
    pyplot.close(figure)


def plot_study(study: str, rows: Sequence[dict[str, Any]], out: Path) -> None:
    """A study's curves (every seed a thin line) beside its results, to out/STUDY.png.

    rows: results of `run_arm`, whose `run` names the folder of the curves. Raises MissingExtraError without matplotlib.
    """
    pyplot = _pyplot()
    stages = [r["stage"] for r in rows if r.get("stage")]
    curves = CURVES[stages[0]] if stages else ()
    width = 4 if len(curves) > 1 else 4.7
    figure, panels = pyplot.subplots(1, len(curves) + 2, figsize=(width * (len(curves) + 2), 3.8), layout="constrained")
    *lefts, middle, right = panels
    names = list(dict.fromkeys(r["arm"] for r in rows))
    colours = [f"C{index}" for index in range(len(names))]
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


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Raises MindOmniError for what a user can mend."""
    parser = Parser(prog="python -m training plot")
    parser.add_argument("run", nargs="+", type=Path, help="a run folder")
    parser.add_argument("--out", type=Path, required=True, help="a PNG")
    options = parser.parse_args(argv)
    if options.out.suffix != ".png":
        raise BadRequestError(f"--out {options.out}: expected a name that ends in .png")
    plot_runs(options.run, options.out)
    return 0
