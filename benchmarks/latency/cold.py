"""The cold start: a fresh process from its first instruction to its first image. The second process finds warm caches
of the disk, the driver and the compilers, the third all but that of the disk."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import mindomni_rt
from mindomni_rt.bundle.manifest import MANIFEST, read_manifest
from mindomni_rt.checkpoint.layout import open_checkpoint

_CHILD = """
import json, sys, time
began = float(sys.argv[1])
import mindomni_rt
request = json.loads(sys.argv[2])
pipe = mindomni_rt.load(request.pop("model"), **request.pop("load"))
loaded = time.time()
result = pipe.generate(request.pop("prompt"), seed=0, **request)
done = time.time()
found = {"load": loaded - began, "first_image": done - began}
if first := result.timings.get("first_token"):
    waited = getattr(getattr(pipe.backend, "runner", None), "waited", {})
    found["first_token_begun"] = found["load"] + waited.get("language", 0.0)
    found["first_token"] = found["first_image"] - result.timings["total"] + first
print(json.dumps(found))
"""


STARTS = ("first", "second", "from the disk")


def cold_starts(
    model: str, load: Mapping[str, Any], request: Mapping[str, Any], times: int = len(STARTS)
) -> list[dict[str, Any]]:
    """{"load", "first_token_begun", "first_token", "first_image"} in seconds of each start, or {"failed": why}. An
    interrupt ends them, and is not raised: what was measured before must not be lost.

    A bundle's first token is begun before all weights are there: "first_token_begun" is the time of loading and of
    waiting for the language model's weights. A request without thinking has neither.

    The third start reads the model from the disk: its pages are dropped from the cache before. It has "read" as well,
    the seconds that reading the language model's files took from there. It is left out where no page can be dropped,
    and for a model that is not given as a folder.
    model: as for `load`; load: its keyword arguments; request: those of `generate`, "prompt" among them.
    """
    text = json.dumps({**request, "model": model, "load": load}, default=str)
    found: list[dict[str, Any]] = []
    for index, name in enumerate(STARTS[:times]):
        disk = name == "from the disk"
        if disk and not (hasattr(os, "posix_fadvise") and Path(model).is_dir()):
            break
        sys.stderr.write(f"cold start {index + 1} of {times}\n")
        try:
            read = _read_from_disk(Path(model)) if disk else {}
            start = _start(text)
            found.append(start if "failed" in start else start | read)
        except KeyboardInterrupt:
            found.append({"failed": "interrupted"})
            break
    return found


def _read_from_disk(folder: Path) -> dict[str, float]:
    _drop_pages(folder)
    seconds = read_seconds(language_files(folder))
    _drop_pages(folder)
    return {"read": round(seconds, 3)}


def _drop_pages(folder: Path) -> None:
    """The next read of a file below the folder comes from the disk, but for pages that a process maps."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def language_files(folder: Path) -> list[Path]:
    """Files of a checkpoint or bundle that hold the language model's weights."""
    if (folder / MANIFEST).is_file():
        graph = read_manifest(folder).graphs["language"]
        return [folder / name for name in (graph.file, *graph.data)]
    return sorted({entry.file for entry in open_checkpoint(folder).tensors["language"].values()})


def read_seconds(files: Iterable[Path]) -> float:
    """How long reading files takes, from the disk or its cache: a start that needs their bytes cannot be faster."""
    buffer, began = bytearray(1 << 24), time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - began


def _start(request: str) -> dict[str, Any]:
    # The same package as here, wherever this process was started.
    root = str(Path(mindomni_rt.__file__).parents[1])
    paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-c", _CHILD, str(time.time()), request]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": paths}
        )
        if done.returncode == 0:
            return {k: round(v, 3) for k, v in json.loads(done.stdout.splitlines()[-1]).items()}
    except (OSError, ValueError, IndexError) as error:
        return {"failed": f"{type(error).__name__}: {error}"[:300]}
    # The last line that names an error, else the last line, else how the process ended.
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    code = done.returncode
    ended = f"ended by signal {-code}" if code < 0 else f"exit code {code}"
    return {"failed": (named or lines or [ended])[-1][:300]}


def describe_cold(start: Mapping[str, Any]) -> str:
    """One start in words."""
    if "failed" in start:
        return f"failed: {start['failed']}"
    read = f"; reading the language model's files alone {start['read']:.2f} s" if "read" in start else ""
    begun = f" (begun after {start['first_token_begun']:.2f} s)" if "first_token_begun" in start else ""
    token = f"first token {start['first_token']:.2f} s{begun}, " if "first_token" in start else ""
    return f"loaded {start['load']:.2f} s, {token}first image {start['first_image']:.2f} s{read}"
