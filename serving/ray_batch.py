"""A batch over many devices: Ray Data hands tasks to replicas, and hands those of a lost replica out again."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mindomni_rt.errors import BadRequestError

from .model import Model
from .painter import Painter
from .ray_cluster import cluster, resources
from .tasks import Task

_BLOCKS = 8  # for each replica: how evenly the work is spread, and how much is done again when one is lost


class _Replica:
    """A painter in a process of its own."""

    def __init__(self, model: Model, out: str) -> None:
        self._painter = Painter(model, Path(out))

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {"error": self._painter.run(Task(**json.loads(row["task"]))) or ""}


def paint_all(
    tasks: Sequence[Task], model: Model, out: Path, replicas: int, address: str | None
) -> Iterator[str | None]:
    """The error of each task as it ends, or None. Raises BadRequestError where a replica cannot load the model."""
    with cluster(address, replicas) as ray:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        rows = [{"task": json.dumps(dataclasses.asdict(task))} for task in tasks]
        count = min(len(rows), replicas * _BLOCKS)
        needs = resources(ray, str(model.options.get("device")))
        done = ray.data.from_items(rows, override_num_blocks=count).map(
            _Replica,
            fn_constructor_args=(model, str(out)),
            compute=ray.data.ActorPoolStrategy(size=min(replicas, len(rows))),
            **needs,
        )
        try:
            for row in done.iter_rows():
                yield row["error"] or None
        except ray.exceptions.RayError as error:
            raise BadRequestError(f"the batch ended early: {_reason(error)}; run it again to go on") from error


def _reason(error: Exception) -> str:
    """The last line of what Ray reports, which holds the cause."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
