"""Tasks to files: what every replica of a batch does, and one without Ray."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from mindomni_rt import __version__
from mindomni_rt.errors import MindOmniError
from mindomni_rt.events import AnswerEvent, GenerationResult, ImageEvent
from mindomni_rt.files import parse_json, read_text, write_text

from .model import Model
from .tasks import Task


class Painter:
    """A loaded model, and the folder that takes its results.

    A task's images are ID.png (or ID-0.png, …), and ID.json has the rest. The JSON file is written last and whole: a
    task that has one is done, whenever the run ended.
    """

    def __init__(self, model: Model, out: Path) -> None:
        self._out = out
        self._pipe = model.load()

    def run(self, task: Task) -> str | None:
        """Does a task unless it is done. Returns what went wrong, or None."""
        if is_done(task, self._out):
            return None
        about: dict[str, Any] = {"id": task.id, "task": task.kind, "prompt": task.prompt, "digest": task.digest}
        error: str | None = None
        try:
            result = self._result(task)
            names: list[str] = []
            if len(result.images):
                written = replace(result, settings={**result.settings, "mindomni_rt": __version__})
                names = [path.name for path in written.save(self._out / f"{task.id}.png")]
            about |= {
                "files": names,
                "seed": result.seed,
                "thinking": result.thinking,
                "answer": result.answer,
                "text": result.text,
                "finish_reason": result.finish_reason,
            }
        except MindOmniError as caught:
            error = str(caught)
            about["error"] = error
        # No times and no names of machines: the same bytes wherever it was painted.
        write_text(self._out / f"{task.id}.json", json.dumps(about, indent=1, ensure_ascii=False) + "\n")
        return error

    def _result(self, task: Task) -> GenerationResult:
        for event in self._pipe.stream(task.request()):
            if isinstance(event, (ImageEvent, AnswerEvent)):
                return event.result
        raise AssertionError("a stream of events without an end")


def is_done(task: Task, out: Path) -> bool:
    """Whether a folder holds this task's result, of the same request; one that failed is tried again."""
    try:
        about = parse_json(read_text(out / f"{task.id}.json"))
        files = about["files"]
        return about["digest"] == task.digest and all((out / Path(name).name).is_file() for name in files)
    except (OSError, ValueError, KeyError, TypeError):
        return False
