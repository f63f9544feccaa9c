"""Figures: curves of runs, results of ablation studies, accuracy of a model after each stage.

mindomni train plot RUN [RUN …] --out FILE.png              what runs have logged
mindomni train plot --study ablation.json --out FOLDER      a picture for each study of a record
mindomni train plot --stages evaluation.json --out FILE.png  a packed model's accuracy by stage
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mindomni_rt.commands import Parser
from mindomni_rt.errors import BadRequestError
from mindomni_rt.figures import blank_figure, log_axis, save
from mindomni_rt.files import read_text, why
from mindomni_rt.outputs import check_target, read_json

CURVES = {
    "pretrain": (("loss/flow", "flow loss"),),
    "sft": (("loss/flow", "flow loss"),),
    "rgpo": (("reward/total", "reward"), ("loss/kl_image", "image KL, per token"), ("loss/kl_text", "text KL")),
}
LOGARITHMIC = ("flow loss", "image KL, per token", "text KL")
EVALUATED = {"pretrain": "captions/image", "sft": "riddles/image", "rgpo": "riddles/image"}
COLUMNS = {
    "text": "answer of the thought",
    "image": "image, with thinking",
    "direct": "image, without thinking",
    "caption": "image of a plain caption",
}
PANELS = {  # title: columns (a pattern of their names), and whether their scale is logarithmic
    "Loss terms": (r"loss/(?!policy).*", True),
    "Rewards": (r"reward/(?!.*_std|zero).*", False),
    "Spread within groups": (r"reward/(group_std|zero_std_groups)", False),
    "Policy": (r"policy/(entropy|clip_fraction)|completion/(truncated|distinct)", False),
    "Gradient norm": (r"grad_norm", True),
}
WORDS = {
    "loss/flow": "flow loss", "loss/distill": "feature KL", "loss/text": "text loss", "loss/read": "reply loss",
    "loss/kl_image": "image KL", "loss/kl_text": "text KL", "grad_norm": "gradient norm",
    "reward/group_std": "standard deviation", "reward/zero_std_groups": "groups without spread",
    "policy/clip_fraction": "clipped tokens", "completion/truncated": "truncated completions",
    "completion/distinct": "distinct completions", "flow": "flow loss", "distill": "feature KL", "text": "text loss",
    "read": "reply loss", "riddles/image": "riddles: image", "riddles/text": "riddles: answer",
    "direct/image": "riddles without thinking", "captions/image": "captions", "questions/text": "questions",
    "edits/image": "edits: image", "edits/text": "edits: answer", "teacher/image": "decoder's own text path",
}  # fmt: skip
_ARMS = {
    "1": "stage 1 alone", "base / 10": "a tenth", "10 x base": "ten times", "format": "format alone",
    "consistency": "consistency alone", "both": "both rewards", "velocity error": "velocity error, weight 10",
}  # fmt: skip
_WIDTH = 9.5  # inches: the width of a page at the resolution below
_DPI = 110
_ACROSS = 3  # panels in a row


def read_metrics(path: Path) -> dict[str, list[float]]:
    """Columns of a metrics.jsonl; figures that were not finite are NaN. Raises BadRequestError without a log."""
    try:
        rows = [json.loads(line) for line in read_text(path).splitlines()]
    except (OSError, ValueError) as error:
        raise BadRequestError(f"{path}: expected the log of a run, a JSON object a line ({why(error)})") from error
    if not rows:
        raise BadRequestError(f"{path}: no line yet; a run writes one every log_every steps")
    names = dict.fromkeys(n for r in rows for n in r)
    return {n: [r[n] if r.get(n) is not None else float("nan") for r in rows] for n in names}


def smooth(values: Sequence[float], window: int) -> list[float]:
    """A running mean over up to `window` values: each with those before it."""
    sums = np.cumsum([0.0, *values])
    return [float((sums[i + 1] - sums[max(0, i + 1 - window)]) / min(i + 1, window)) for i in range(len(values))]


def slug(name: str) -> str:
    """A name as part of a file name: letters and digits in lower case, "-" for the rest."""
    return "".join(c if c.isalnum() else "-" for c in name.lower()).strip("-")


def _finish(axes: Any, title: str, logarithmic: bool = False, percent: bool = False) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("step")
    axes.locator_params(axis="x", integer=True, min_n_ticks=1)
    axes.grid(alpha=0.25)
    if logarithmic:
        log_axis(axes, "y", (1, 2, 5), (1,))
    if percent:
        axes.set(ylim=(-3, 103), ylabel="right, %")
    axes.legend(fontsize=8)


def plot_runs(runs: Sequence[Path], out: Path) -> None:
    """What each run logged, with its evaluations, to a PNG. Raises BadRequestError, MissingExtraError."""
    for run in runs:
        if not (run / "metrics.jsonl").is_file():
            what = "a folder without metrics.jsonl" if run.is_dir() else "no such folder"
            raise BadRequestError(f"{run}: {what}; expected the folder of a run, `out` in its configuration")
    logs = {run: read_metrics(run / "metrics.jsonl") for run in runs}
    parts = {run: _panels(run, log) for run, log in logs.items()}
    rows = [-(-len(p) // _ACROSS) for p in parts.values()]
    figure = blank_figure(_WIDTH, 2.7 * sum(rows) + 0.3 * len(runs), "train")
    blocks = figure.subfigures(len(runs), 1, height_ratios=rows, squeeze=False)[:, 0]
    for block, (run, panels), count in zip(blocks, parts.items(), rows, strict=True):
        block.suptitle(run.name, fontsize=11)
        for place, (title, steps, lines, logarithmic, percent) in enumerate(panels, 1):
            axes = block.add_subplot(count, min(_ACROSS, len(panels)), place)
            for name, values in lines.items():
                axes.plot(steps, values, "o-" if len(steps) < 30 else "-", lw=1.3, ms=3, label=WORDS.get(name, name))
            _finish(axes, title, logarithmic, percent)
    save(figure, out, _DPI)


Panel = tuple[str, list[float], dict[str, Any], bool, bool]
"""Title, steps, lines by column name, logarithmic scale, per cent."""


def _panels(run: Path, log: dict[str, list[float]]) -> list[Panel]:
    """The panels that have data."""
    out: list[Panel] = []
    window = max(1, len(log["step"]) // 30)
    for title, (pattern, logarithmic) in PANELS.items():
        found = sorted(c for c in log if re.fullmatch(pattern, c))
        if found:
            lines = {_short(c): smooth(log[c], window) for c in found}
            out.append((title, log["step"], lines, logarithmic and _positive(lines), False))
    held = run / "evaluation.jsonl"
    if held.exists():
        figures = read_metrics(held)
        right = {c: 100 * np.array(figures[c]) for c in figures if re.fullmatch(r".+/(image|text)", c)}
        losses: dict[str, Any] = {c: figures[c] for c in ("flow", "distill", "text", "read") if c in figures}
        if right:
            out.append(("Held-out accuracy", figures["step"], right, False, True))
        if losses:
            out.append(("Validation loss", figures["step"], losses, _positive(losses), False))
    return out


def _positive(lines: dict[str, Any]) -> bool:
    """Whether a logarithmic scale shows something: stage 3's KLs are 0 at its first step."""
    return any(np.nanmax(values, initial=0) > 0 for values in lines.values())


def _short(column: str) -> str:
    return WORDS.get(column, column.partition("/")[2] or column)


def arm_label(row: dict[str, Any]) -> str:
    """An arm's name in the words of docs/training.md: the steps of its budget, "linear only" for no layers."""
    if row["arm"] in _ARMS:
        return _ARMS[row["arm"]]
    name = re.sub(r"(\S+) budget", f"{row.get('steps')} steps", str(row["arm"]))
    name = re.sub(r"^0 layers", "linear only", re.sub(r"^1 layers", "1 layer", name))
    return f"stages {name.replace('+', ' + ')}" if re.fullmatch(r"1(\+\d)*", name) else name


def plot_study(study: str, rows: Sequence[dict[str, Any]], out: Path) -> None:
    """A study's curves (mean over seeds, with their range) above its results, to out/STUDY.png.

    rows: results of `run_arm`, whose `run` names the folder of the curves; without folders only results are shown.
    Raises MissingExtraError without matplotlib.
    """
    names = list(dict.fromkeys(r["arm"] for r in rows))
    curves = _curves(rows)
    columns = ["caption"] if all(r.get("stage") == "pretrain" for r in rows) else list(COLUMNS)
    heights = [*([2.9 * -(-len(curves) // _ACROSS)] if curves else []), 1.2 + 0.3 * len(names)]
    figure = blank_figure(_WIDTH, sum(heights), "train")
    blocks = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    if curves:
        _draw_curves(blocks[0], curves)
    panels = blocks[-1].subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axes, column in zip(panels, columns, strict=True):
        for place, name in enumerate(names):
            values = [100 * r[column] for r in rows if r["arm"] == name]
            axes.plot([min(values), max(values)], [place, place], color=f"C{place}", lw=2)
            axes.plot(np.mean(values), place, "o", color=f"C{place}", ms=6)
        axes.set_title(COLUMNS[column], fontsize=10)
        axes.set(xlim=(-5, 105))
        axes.grid(axis="x", alpha=0.25)
    figure.suptitle(study[:1].upper() + study[1:], fontsize=11)
    blocks[-1].supxlabel("right, %: mean and range of seeds", fontsize=10)
    labels = [arm_label(next(r for r in rows if r["arm"] == n)) for n in names]
    panels[0].set_yticks(range(len(names)), labels)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    save(figure, out / f"{slug(study)}.png", _DPI)


Curves = dict[str, dict[str, list[tuple[list[float], list[float]]]]]
"""Panel title → arm label → (steps, values) of each seed."""


def _curves(rows: Sequence[dict[str, Any]]) -> Curves:
    found: Curves = {}
    for row in rows:
        if not row.get("stage") or not row.get("run"):
            continue
        folder, label = Path(row["run"]), arm_label(row)
        if (folder / "metrics.jsonl").exists():
            metrics = read_metrics(folder / "metrics.jsonl")
            window = max(1, len(metrics["step"]) // 12)
            for column, title in CURVES[row["stage"]]:
                if column in metrics:
                    line = (metrics["step"], smooth(metrics[column], window))
                    found.setdefault(title, {}).setdefault(label, []).append(line)
        if (folder / "evaluation.jsonl").exists():
            figures, column = read_metrics(folder / "evaluation.jsonl"), EVALUATED[row["stage"]]
            line = (figures["step"], [100 * v for v in figures[column]])
            found.setdefault(WORDS[column], {}).setdefault(label, []).append(line)
    return found


def _draw_curves(block: Any, curves: Curves) -> None:
    across, order = min(_ACROSS, len(curves)), list(dict.fromkeys(label for arms in curves.values() for label in arms))
    for place, (title, arms) in enumerate(curves.items(), 1):
        axes = block.add_subplot(-(-len(curves) // across), across, place)
        for label, seeds in arms.items():
            count = min(len(values) for _, values in seeds)
            steps = seeds[0][0][:count]
            values = np.array([v[:count] for _, v in seeds])
            colour = f"C{order.index(label)}"
            axes.plot(steps, values.mean(0), color=colour, lw=1.4, label=label)
            axes.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.2, lw=0)
        percent = title in WORDS.values() and title not in LOGARITHMIC
        _finish(axes, title[:1].upper() + title[1:], title in LOGARITHMIC, percent)
        if place > 1:
            axes.get_legend().remove()


STAGES = {"prior": "stage 0", "pretrain": "stage 1", "sft": "stage 2", "rgpo": "stage 3"}
SUITES_SHOWN = ("captions/image", "questions/text", "riddles/text", "riddles/image", "direct/image", "edits/image")


def plot_stages(records: dict[str, Any], out: Path) -> None:
    """A packed model's accuracy after each stage, with 95 % intervals, to a PNG.

    records: what `evaluation.json` holds. Raises MissingExtraError without matplotlib.
    """
    figure = blank_figure(_WIDTH, 4.6, "train")
    panels = figure.subplots(2, 3, sharex=True, sharey=True)
    for axes, name in zip(panels.flat, SUITES_SHOWN, strict=True):
        suite, _, score = name.partition("/")
        found = [r["scores"][suite][score] for r in records.values()]
        shares = np.array([100 * f["share"] for f in found])
        intervals = 100 * np.array([f["interval"] for f in found])
        axes.errorbar(range(len(found)), shares, np.abs(intervals.T - shares), fmt="o-", ms=5, lw=1.3, capsize=3)
        for place, (share, (low, high)) in enumerate(zip(shares, intervals, strict=True)):
            at, offset = (high, 4) if share < 85 else (low, -13)
            axes.annotate(
                f"{share:.0f}", (place, at), (0, offset), textcoords="offset points", ha="center", fontsize=9,
                bbox={"boxstyle": "square,pad=0.1", "fc": "white", "ec": "none", "alpha": 0.85},
            )  # fmt: skip
        axes.set_title(WORDS[name][:1].upper() + WORDS[name][1:], fontsize=10)
        axes.set(ylim=(-5, 108), xlim=(-0.3, len(found) - 0.7), yticks=range(0, 101, 25))
        axes.set_xticks(range(len(found)), [STAGES.get(s, s) for s in records])
        axes.grid(alpha=0.25)
    for axes in panels[:, 0]:
        axes.set_ylabel("right, %")
    save(figure, out, _DPI)


def _read(path: Path, key: str) -> dict[str, Any]:
    found: dict[str, Any] = read_json(path)
    try:
        return found[key] if key else found
    except (LookupError, TypeError) as error:
        raise BadRequestError(f"{path}: not the record that was expected ({type(error).__name__}: {error})") from error


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Raises MindOmniError for mistakes that the user can mend."""
    parser = Parser(prog="mindomni train plot", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", nargs="*", type=Path, help="run folders")
    parser.add_argument("--study", type=Path, metavar="JSON", help="the record of `ablate`: a picture for each study")
    parser.add_argument("--only", nargs="+", help="studies of --study to draw; default: all")
    parser.add_argument("--stages", type=Path, metavar="JSON", help="evaluation.json of a packed model")
    parser.add_argument("--out", type=Path, required=True, help="a PNG; with --study a folder")
    options = parser.parse_args(argv)
    if sum(map(bool, (options.run, options.study, options.stages))) != 1:
        raise BadRequestError("expected run folders, --study or --stages: one of the three")
    if options.study:
        check_target(options.out / "trial", "--out")
        results = _read(options.study, "results")
        for study in options.only or results:
            if study not in results:
                raise BadRequestError(f"--only {study!r}: expected some of {', '.join(results)}")
            plot_study(study, results[study], options.out)
        print(f"written to {options.out}")
        return 0
    if options.out.suffix != ".png":
        raise BadRequestError(f"--out {options.out}: expected a name that ends in .png")
    check_target(options.out)
    if options.stages:
        plot_stages(_read(options.stages, ""), options.out)
    else:
        plot_runs(options.run, options.out)
    print(f"written to {options.out}")
    return 0
