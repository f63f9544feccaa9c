"""`python -m benchmarks quality SUITE MODEL --prompts PATH --out FOLDER`: images for official evaluators.

Prompts are your own copies: none is bundled or downloaded. The same command continues a run that ended early;
`--shard i/n` in n processes shares one folder. No official score is computed here: `report.md` says what to run next.
The suite `shapes` needs no prompts and is scored exactly.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

import mindomni_rt
from mindomni_rt.checkpoint.layout import resolve
from mindomni_rt.describe import read_recommended
from mindomni_rt.errors import BadRequestError
from mindomni_rt.options import parse_size

from ..schema import FORMAT
from .images import SUITES as IMAGES
from .paint import make, request_of
from .report import write_report
from .run import RunFolder, fingerprint, shard_of
from .shapes import SHAPES
from .suite import Item, Job, Settings, Suite, hashed

if TYPE_CHECKING:
    from mindomni_rt.pipeline import Pipeline

SUITES = {s.name: s for s in (*IMAGES, SHAPES)}


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
    parser.add_argument("--no-think", dest="think", action="store_false", default=None)
    parser.add_argument("--samples", type=int, help="images a prompt")
    parser.add_argument("--size", metavar="WxH", help="pixels; square images, or one number")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--max-new-tokens", type=int)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype")
    parser.add_argument("--memory-budget")


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
