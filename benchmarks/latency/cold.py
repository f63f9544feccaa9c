"""The cold start: a fresh process from its first instruction to its first image, twice. The second process finds warm
caches of the disk, the driver and the compilers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mindomni_rt

_CHILD = """
import json, sys, time
began = float(sys.argv[1])
import mindomni_rt
request = json.loads(sys.argv[2])
pipe = mindomni_rt.load(request.pop("model"), **request.pop("load"))
loaded = time.time()
pipe.generate(request.pop("prompt"), seed=0, **request)
print(json.dumps({"load": loaded - began, "first_image": time.time() - began}))
"""


def cold_starts(
    model: str, load: Mapping[str, Any], request: Mapping[str, Any], times: int = 2
) -> list[dict[str, Any]]:
    """{"load", "first_image"} in seconds of each start, or {"failed": why}. An interrupt ends them, and is not raised:
    what was measured before must not be lost.

    model: as for `load`; load: its keyword arguments; request: those of `generate`, "prompt" among them.
    """
    text = json.dumps({**request, "model": model, "load": load}, default=str)
    found: list[dict[str, Any]] = []
    for index in range(times):
        sys.stderr.write(f"cold start {index + 1} of {times}\n")
        try:
            found.append(_start(text))
        except KeyboardInterrupt:
            found.append({"failed": "interrupted"})
            break
    return found


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
    return f"loaded {start['load']:.2f} s, first image {start['first_image']:.2f} s"
