"""A peers result as a table and as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from mindomni_rt.figures import COLOURS, new_figure, save

from ..results import table


def report(data: Mapping[str, Any]) -> str:
    """Markdown. On a CPU ratios alone: seconds of a toy model say nothing about the model."""
    seconds = not data["device"].startswith("cpu")
    head = ["peer", "work", "relative error", "peer / ours", "95 % interval", "n", *(["ours", "peer"] * seconds)]
    rows: list[list[Any]] = []
    for name, group in data["groups"].items():
        pairs = group.get("pairs", {})
        rows += [] if pairs else [[group["peer"], name, _why(group)]]
        for work, pair in pairs.items():
            interval = f"{pair['low']:.2f} to {pair['high']:.2f}"
            row = [group["peer"], work, f"{group['error']:.1e}", f"{pair['ratio']:.2f}", interval, pair["n"]]
            rows.append([*row, *(_speeds(pair) if seconds else ())])
    lines = [
        f"# Peers, {data['model']['name']}",
        "",
        f"{data['date']}, commit {data['commit']}, {data['device']}, {data['model']['dtype']}. peer / ours: the median "
        "over pairs of runs, A B A B, with its 95 % bootstrap interval; above 1 ours is faster. Outputs were compared "
        "first.",
        "",
        "; ".join(f"{k} {v}" for k, v in (*data["machine"].items(), *data["versions"].items())),
        "",
        table(head, rows),
        "",
        *(f"- {name}: {group['note']}." for name, group in data["groups"].items() if group.get("note")),
    ]
    return "\n".join(lines) + "\n"


def _why(group: Mapping[str, Any]) -> str:
    """Why a group has no ratios."""
    if "agrees" in group:
        text = "" if group["tokens_equal"] is not False else ", texts differ"
        error = "nan" if group["error"] is None else f"{group['error']:.1e}"
        return f"DISAGREES: {error}, bound {group['bound']:.0e}{text}"
    return " ".join(str(group.get("missing") or f"failed: {group['failed']}").split())


def _speeds(pair: Mapping[str, Any]) -> list[str]:
    if "rates" in pair:
        return [f"{pair['rates'][side]:.1f} {pair['rates']['of']}" for side in ("ours", "theirs")]
    return [f"{median(pair[f'{side}_s']) * 1e3:.2f} ms" for side in ("ours", "theirs")]


def plot(data: Mapping[str, Any], path: Path) -> None:
    """Ratios with their intervals, PNG; nothing where no pair was timed."""
    rows = [
        (index, f"{group['peer']}: {work}", pair)
        for index, group in enumerate(data["groups"].values())
        for work, pair in group.get("pairs", {}).items()
    ]
    if not rows:
        return
    figure, axes = new_figure(8.0, 1.2 + 0.4 * len(rows))
    for at, (index, _, pair) in enumerate(reversed(rows)):
        colour = COLOURS[index % len(COLOURS)]
        axes.plot([pair["low"], pair["high"]], [at, at], color=colour, lw=2)
        axes.plot(pair["ratio"], at, "o", color=colour)
        axes.annotate(f"{pair['ratio']:.2f}", (pair["ratio"], at), (0, 6), textcoords="offset points", fontsize=8)
    axes.axvline(1, color="gray", lw=1, ls=":")
    axes.set_yticks(range(len(rows)), [label for _, label, _ in reversed(rows)], fontsize=8)
    axes.set_ylim(-0.5, len(rows) - 0.3)
    axes.set_xlabel("peer / ours; above 1 ours is faster")
    axes.set_title(f"{data['model']['name']}, {data['device']}, {data['model']['dtype']}", fontsize=10, loc="left")
    save(figure, path)
