"""report.json and report.md of a `quality` run: what was asked and done, published scores beside, what to run next."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..machine import commit
from ..results import write_atomic, write_json
from .run import RunFolder
from .suite import Item, Prompts, Settings, Suite

SOURCE = "published for MindOmni (README of the released project), not measured here"


@dataclass(frozen=True, kw_only=True)
class Share:
    """right of n, n ≥ 1."""

    right: int
    n: int

    @property
    def interval(self) -> tuple[float, float]:
        """The Wilson score interval at 95 %. Source: E. B. Wilson, J. Am. Stat. Assoc. 22 (1927)."""
        z, n, p = 1.959964, self.n, self.right / self.n
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, middle - half), min(1.0, middle + half)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        low, high = self.interval
        return {
            "right": self.right,
            "n": self.n,
            "share": round(self.right / self.n, 4),
            "interval": [round(low, 4), round(high, 4)],
        }


def write_report(
    suite: Suite,
    folder: RunFolder,
    prompts: Prompts,
    chosen: Sequence[Item],
    settings: Settings,
    run: Mapping[str, Any],
) -> str:
    """Writes both files, and what the suite makes of all done items; returns the text. Counts every shard's items.

    run: what run.json holds. Raises WriteError, and BadRequestError for a damaged record.
    """
    while True:
        done = [item for item in chosen if folder.done(suite.outputs(item, settings))]
        found = suite.finish(folder, done, chosen, run)
        if len(done) == len(chosen):
            folder.sweep()
        data = _data(suite, prompts, settings, run, found, len(done), len(chosen))
        text = report(suite, data)
        write_json(folder.folder / "report.json", data)
        write_atomic(folder.folder / "report.md", text + "\n")
        # Another shard may have ended meanwhile: the last to write must not have the older count.
        if len(done) == sum(folder.done(suite.outputs(item, settings)) for item in chosen):
            return text


def _data(
    suite: Suite,
    prompts: Prompts,
    settings: Settings,
    run: Mapping[str, Any],
    found: Mapping[str, Any],
    done: int,
    chosen: int,
) -> dict[str, Any]:
    return {
        **run,
        "kind": "quality report",
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "done": done,
        "chosen": chosen,
        "total": len(prompts.items),
        "partial": done < len(prompts.items),
        "thinking": {True: "on", False: "off", None: "both, compared"}[settings.think],
        "scores": found.get("scores", {}),
        "published": dict(suite.published),
        "published_source": SOURCE if suite.published else "",
        "evaluated": suite.evaluated,
        "commands": suite.commands(run),
        "notes": found.get("notes", []),
    }


def report(suite: Suite, data: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    model, runs_on = data["model"], data["runs_on"]
    state = "partial: " if data["partial"] else ""
    some = f", the first {data['chosen']} asked for" if data["chosen"] < data["total"] else ""
    lines = [
        f"# {suite.title} of {model['name']}",
        "",
        f"{data['date']}, commit {data['commit']}, {runs_on['backend']} on {runs_on['device']} in {runs_on['dtype']}. "
        f"{state}{data['done']} of {data['total']} items{some}. Thinking: {data['thinking']}.",
        "",
        "; ".join(f"{k} {v}" for k, v in data["settings"].items() if v is not None and k != "think"),
    ]
    if data["scores"]:
        lines += ["", "| score | share | 95 % interval | n |", "| --- | --- | --- | --- |"]
        for name, score in data["scores"].items():
            low, high = (100 * x for x in score["interval"])
            lines.append(f"| {name} | {100 * score['share']:.1f} % | {low:.1f} to {high:.1f} % | {score['n']} |")
    if data["published"]:
        lines += ["", f"| {SOURCE} | {suite.title} |", "| --- | --- |"]
        lines += [f"| {name} | {value} |" for name, value in data["published"].items()]
    if data["commands"]:
        lines += ["", f"Next, in the evaluator's own project, with RUN this folder ({suite.evaluated}):", "", "```"]
        lines += [*data["commands"], "```"]
    lines += [f"\n{note[0].upper()}{note[1:]}." for note in data["notes"]]
    return "\n".join(lines)
