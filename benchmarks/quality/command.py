"""`mindomni bench quality SUITE MODEL --prompts PATH --out FOLDER`: images for official evaluators.

Prompts are your own copies: none is bundled or downloaded. The same command continues a run that ended early;
`--shard i/n` in n processes shares one folder. No official score is computed here: `report.md` says what to run next.
The suite `shapes` needs no prompts and is scored exactly.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

import mindomni_rt
from mindomni_rt.checkpoint.layout import resolve
from mindomni_rt.describe import read_recommended
from mindomni_rt.errors import BadRequestError
from mindomni_rt.options import parse_size
from mindomni_rt.pipeline import Pipeline

from ..machine import commit
from ..results import FORMAT, check_out, read_json, table, write_result
from .paint import make, request_of
from .run import RunFolder, fingerprint, shard_of
from .suite import Item, Job, Settings, Suite, hashed
from .suites import SHAPES, SUITES

SOURCE = "published for MindOmni (README of the released project), not measured here"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command. Defaults are each suite's own, which `--list` shows, and the model's."""
    parser.add_argument("suite", nargs="?", help=", ".join(SUITES))
    parser.add_argument("model", nargs="?", help="checkpoint folder, hub id or bundle")
    parser.add_argument("--list", action="store_true", help="suites, their prompt files, published scores")
    parser.add_argument("--prompts", type=Path, help="your copy of the benchmark's prompts")
    parser.add_argument("--out", type=Path, help="the run's folder, new or to be continued")
    parser.add_argument("--shard", default="1/1", metavar="I/N", help="this process's part of the items")
    parser.add_argument("--n", type=int, help="only the first N items")
    parser.add_argument("--seed", type=int, default=0, help="base of the seeds of all images")
    parser.add_argument(
        "--no-think", dest="think", action="store_false", default=None, help="paint from the prompt alone"
    )
    parser.add_argument("--samples", type=int, help="images a prompt")
    parser.add_argument("--size", metavar="WxH", help="pixels; square images, or one number")
    parser.add_argument("--steps", type=int, help="default: the model's own")
    parser.add_argument("--guidance", type=float, help="default: the model's own")
    parser.add_argument("--max-new-tokens", type=int, help="default: the suite's own")
    parser.add_argument("--backend", default="auto", help="auto, torch (checkpoints), onnx or tensorrt (bundles)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16")
    parser.add_argument("--memory-budget", metavar="SIZE", help="such as 8GiB: parts take turns")


def run(options: argparse.Namespace) -> int:
    """Makes the missing items and reports. Exit code 130 when interrupted; finished items are kept."""
    if options.list:
        sys.stdout.write(listing() + "\n")
        return 0
    suite, settings = _asked(options)
    index, count = shard_of(options.shard)
    if options.n is not None and options.n < 1:
        raise BadRequestError(f"--n {options.n}: expected at least 1")
    files, items = suite.read(options.prompts)
    if suite is SHAPES and options.think is False:
        items = [item for item in items if not item.think]
    request_of(items[0], settings)  # its checks, before a model is loaded
    chosen = items[: options.n]
    model = resolve(options.model)
    settings = settings.of_model(read_recommended(model))
    job = Job(suite=suite, settings=settings, folder=RunFolder(options.out), chosen=chosen, total=len(items))
    name = model.resolve().name if Path(options.model).is_dir() else Path(options.model).name
    claim: dict[str, Any] = {
        "kind": "quality",
        "format": FORMAT,
        "suite": suite.name,
        "model": {"name": name, "fingerprint": fingerprint(model)},
        "settings": asdict(settings),
        "prompts": {"files": [p.name for p in files], "sha256": hashed(files)},
    }
    known, mine, done = job.folder.check(claim), chosen[index - 1 :: count], job.done()
    todo = [item for item in mine if item not in done]
    code = 0
    if todo or not known:
        names = ("backend", "device", "dtype", "memory_budget")
        check_out(job.folder.settings)
        pipe = mindomni_rt.load(options.model, **{name: getattr(options, name) for name in names})
        device = pipe.backend.device.partition(":")[0]  # shards may have a GPU each
        claim["runs_on"] = {"backend": pipe.backend.name, "device": device, "dtype": pipe.backend.dtype}
        job.folder.claim(claim)
        try:
            _make(pipe, job, todo, len(mine))
        except KeyboardInterrupt:
            sys.stderr.write("error: interrupted; what was made is kept, and the same command goes on\n")
            code = 130
        except Exception:
            write_report(job)
            raise
    sys.stdout.write(write_report(job) + "\n")
    return code


def _asked(options: argparse.Namespace) -> tuple[Suite, Settings]:
    """The suite and its settings, the defaults filled in. Raises BadRequestError."""
    if options.suite not in SUITES:
        raise BadRequestError(f"suite {options.suite!r}: expected one of {', '.join(SUITES)}; --list tells more")
    suite = SUITES[options.suite]
    for name in ("model", "out"):
        if getattr(options, name) is None:
            raise BadRequestError(f"{'MODEL' if name == 'model' else '--out'} is missing: see --help")
    given = {f.name: value for f in fields(Settings) if (value := getattr(options, f.name)) is not None}
    if options.size is not None:
        width, given["size"] = parse_size(options.size)
        if width != given["size"]:
            raise BadRequestError(f"--size {options.size}: expected a square; the evaluators take no other images")
    if suite is SHAPES:  # it has items of both kinds
        given.pop("think", None)
    settings = replace(suite.defaults, **given)
    if not 1 <= settings.samples <= suite.most_samples:
        raise BadRequestError(f"--samples {settings.samples}: {suite.title} takes 1 to {suite.most_samples}")
    if settings.max_new_tokens < 1:
        raise BadRequestError(f"--max-new-tokens {settings.max_new_tokens}: expected at least 1")
    return suite, settings


def _make(pipe: Pipeline, job: Job, todo: Sequence[Item], total: int) -> None:
    """Makes and stores the missing items. Raises StorageError, and BadRequestError naming an item's place."""
    made = total - len(todo)
    with tqdm(total=total, initial=made, desc=job.suite.name, unit="item", disable=None, file=sys.stderr) as bar:
        for item in todo:
            try:
                files = make(pipe, job.suite, item, job.settings)
            except BadRequestError as error:
                raise BadRequestError(f"{item.where}: {error}") from error
            job.folder.store(files)
            bar.update()


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


def listing() -> str:
    """Every suite: prompts, evaluator, published scores, defaults."""
    lines = []
    for suite in SUITES.values():
        published = ", ".join(f"{value} ({name})" for name, value in suite.published.items()) or "none"
        defaults = ", ".join(f"{k} {v}" for k, v in asdict(suite.defaults).items() if v is not None and k != "seed")
        lines += [
            suite.name,
            f"  prompts    {suite.prompts} ({suite.project})",
            f"  evaluator  {suite.evaluated}",
            f"  published  {published}",
            f"  defaults   {defaults}",
        ]
    return "\n".join([*lines, "", "published: README of the released MindOmni; nothing is bundled or downloaded"])
