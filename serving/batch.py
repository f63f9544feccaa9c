"""A file of prompts to a folder of pictures, on one device or many.

Each line of the file is a JSON object: "prompt", and any of "id", "task" ("generate" or "understand"), "image" (a path
beside the file), "size", and the options of `mindomni generate` under the names of `mindomni_rt.Request`. Results are
DIR/ID.png and DIR/ID.json. Run it again after an interruption: what is done is not done again.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from mindomni_rt.errors import BadRequestError
from mindomni_rt.outputs import check_target

from . import model
from .model import Model
from .painter import Painter, is_done
from .tasks import Task, read_tasks

logger = logging.getLogger(__name__)
_MOST_REPLICAS = 100_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The file, the folder, the model and the replicas."""
    parser.add_argument("file", type=Path, metavar="PROMPTS.jsonl", help="fields of Request as JSON, one object a line")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for a picture and a JSON file each")
    model.add_arguments(parser, flag=True)
    parser.add_argument("--replicas", type=int, default=1, help="copies of the model, one a GPU; above 1 by Ray Data")
    parser.add_argument("--ray-address", help="of a running Ray cluster; DIR must be a folder that all machines share")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress")


def run(given: argparse.Namespace) -> int:
    """Exit code 1 where tasks failed; each has its error in its JSON file. Raises MindOmniError."""
    logging.basicConfig(level=logging.ERROR if given.quiet else logging.WARNING, format="%(levelname)s %(message)s")
    chosen = model.chosen(given)
    if not 1 <= given.replicas <= _MOST_REPLICAS:
        raise BadRequestError(f"--replicas {given.replicas}: expected 1 to {_MOST_REPLICAS}")
    tasks = read_tasks(given.file, chosen.path, chosen.defaults)
    check_target(given.out / "trial")
    left = [task for task in tasks if not is_done(task, given.out)]
    if left and given.ray_address is None:
        chosen.check()
    failed = 0
    for number, problem in enumerate(_results(left, chosen, given), len(tasks) - len(left) + 1):
        failed += problem is not None
        if not given.quiet:
            sys.stderr.write(f"\r{number} of {len(tasks)}" + (f", {failed} failed" if failed else ""))
            sys.stderr.flush()
    sys.stderr.write("" if given.quiet else f"\r{len(tasks)} of {len(tasks)}, {failed} failed: {given.out}\n")
    return int(failed > 0)


def _results(left: Sequence[Task], chosen: Model, given: argparse.Namespace) -> Iterator[str | None]:
    """The error of each task as it ends, or None."""
    if not left:
        return
    if given.replicas == 1 and given.ray_address is None:
        painter = Painter(chosen, given.out)
        for task in left:
            yield painter.run(task)
        return
    from .ray_batch import paint_all  # Ray takes seconds to import

    yield from paint_all(left, chosen, given.out.absolute(), given.replicas, given.ray_address)
