"""A peers result as a table and as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any


def report(data: Mapping[str, Any]) -> str:
    """Markdown. On a CPU ratios alone: seconds of a toy model say nothing about the model."""
    seconds = not data["device"].startswith("cpu")
    lines = [
        f"# Peers, {data['model']['name']}",
        "",
        f"{data['date']}, commit {data['commit']}, {data['device']}, {data['model']['dtype']}. peer / ours: the median "
        "over pairs of runs, A B A B, with its 95 % bootstrap interval; above 1 ours is faster. Outputs were compared "
        "first.",
        "",
        "; ".join(f"{k} {v}" for k, v in (*data["machine"].items(), *data["versions"].items())),
        "",
        "| peer | work | relative error | peer / ours | 95 % interval | n |" + (" ours | peer |" if seconds else ""),
        "| --- | --- | --- | --- | --- | --- |" + (" --- | --- |" if seconds else ""),
    ]
    after = []
    for name, group in data["groups"].items():
        pairs = group.get("pairs", {})
        if not pairs:
            lines.append(f"| {group['peer']} | {name} | {_why(group)} | - | - | - |" + (" - | - |" if seconds else ""))
        for work, pair in pairs.items():
            row = f"| {group['peer']} | {work} | {group['error']:.1e} | {pair['ratio']:.2f} "
            row += f"| {pair['low']:.2f} to {pair['high']:.2f} | {pair['n']} |"
            lines.append(row + (_speeds(pair) if seconds else ""))
        if group.get("note"):
            after.append(f"- {name}: {group['note']}.")
    return "\n".join([*lines, "", *after]) + "\n"


def _why(group: Mapping[str, Any]) -> str:
    """Why a group has no ratios."""
    if "agrees" in group:
        text = "" if group["tokens_equal"] is not False else ", texts differ"
        return f"DISAGREES: {group['error']:.1e}, bound {group['bound']:.0e}{text}"
    return " ".join(str(group.get("missing") or f"failed: {group['failed']}").split()).replace("|", "/")


def _speeds(pair: Mapping[str, Any]) -> str:
    if "rates" in pair:
        rates = pair["rates"]
        return f" {rates['ours']:.1f} {rates['of']} | {rates['theirs']:.1f} {rates['of']} |"
    return f" {median(pair['ours_s']) * 1e3:.2f} ms | {median(pair['theirs_s']) * 1e3:.2f} ms |"


def plot(data: Mapping[str, Any], path: Path) -> None:
    """Ratios with their intervals, PNG; nothing where no pair was timed."""
    from ..figures import COLOURS, new_figure, save

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
