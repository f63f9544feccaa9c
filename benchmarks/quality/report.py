"""report.json and report.md of a `quality` run: what was asked and done, published scores beside, what to run next."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from ..machine import commit
from ..results import read_json, table, write_result
from .suite import Job

SOURCE = "published for MindOmni (README of the released project), not measured here"


def write_report(job: Job) -> str:
    """Writes both files and returns the text. Counts every shard's items. Raises StorageError."""
    suite, run = job.suite, read_json(job.folder.settings)
    while True:
        done = job.done()
        if len(done) == len(job.chosen):
            job.folder.sweep()
        data = {
            **run,
            "kind": "quality report",
            "title": suite.title,
            "date": time.strftime("%Y-%m-%d"),
            "commit": commit(),
            "done": len(done),
            "chosen": len(job.chosen),
            "total": job.total,
            "partial": len(done) < job.total,
            "thinking": {True: "on", False: "off", None: "both, compared"}[job.settings.think],
            "scores": suite.scores(job.folder, done),
            "published": dict(suite.published),
            "published_source": SOURCE if suite.published else "",
            "evaluated": suite.evaluated,
            "commands": suite.commands(run),
        }
        text = report(data)
        write_result(job.folder.folder / "report.json", data, text)
        # Another shard may have ended meanwhile: the last to write must not have the older count.
        if len(done) == len(job.done()):
            return text


def report(data: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    model, runs_on = data["model"], data["runs_on"]
    state = "partial: " if data["partial"] else ""
    some = f", the first {data['chosen']} asked for" if data["chosen"] < data["total"] else ""
    lines = [
        f"# {data['title']} of {model['name']}",
        "",
        f"{data['date']}, commit {data['commit']}, {runs_on['backend']} on {runs_on['device']} in {runs_on['dtype']}. "
        f"{state}{data['done']} of {data['total']} items{some}. Thinking: {data['thinking']}.",
        "",
        "; ".join(f"{k} {v}" for k, v in data["settings"].items() if v is not None and k != "think"),
    ]
    if data["scores"]:
        rows = []
        for name, score in data["scores"].items():
            low, high = (100 * x for x in score["interval"])
            rows.append([name, f"{100 * score['share']:.1f} %", f"{low:.1f} to {high:.1f} %", score["n"]])
        lines += ["", table(["score", "share", "95 % interval", "n"], rows)]
    if data["published"]:
        lines += ["", table([SOURCE, data["title"]], data["published"].items())]
    if data["commands"]:
        lines += ["", f"Next, in the evaluator's own project, with RUN this folder ({data['evaluated']}):", "", "```"]
        lines += [*data["commands"], "```"]
    return "\n".join(lines)
