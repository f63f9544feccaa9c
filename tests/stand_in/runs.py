"""Workers as the tests call them: each job once, two at a time where they are known before."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import checkpoint

ROOT = Path(__file__).parents[2]
WORKERS = min(2, len(os.sched_getaffinity(0)))
SECONDS = 1800  # of a worker; pytest's own limit ends a test before


class Runs:
    """Results of jobs by their text. `folder`: where checkpoints are written."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._pool = folder, ThreadPoolExecutor(WORKERS)
        self._found: dict[str, Future[dict[str, Any]]] = {}
        self._full = self._thin = ""

    @property
    def full(self) -> str:
        """The published sizes."""
        self._full = self._full or str(checkpoint.write(self._folder / "full", checkpoint.sizes()))
        return self._full

    @property
    def thin(self) -> str:
        """The published widths with two layers in each stack: for what does not depend on memory."""
        if not self._thin:
            config = checkpoint.sizes()
            thin = replace(
                config,
                vision=replace(config.vision, num_layers=2, full_attention_layers=(1,)),
                language=replace(config.language, stack=replace(config.language.stack, num_layers=2)),
                decoder=replace(config.decoder, stack=replace(config.decoder.stack, num_layers=2)),
            )
            self._thin = str(checkpoint.write(self._folder / "thin", thin))
        return self._thin

    def begin(self, job: dict[str, Any]) -> Future[dict[str, Any]]:
        """Starts a job that is not yet known."""
        text = json.dumps({"folder": job.get("folder") or self.full, **job}, sort_keys=True)
        if text not in self._found:
            self._found[text] = self._pool.submit(_run, text)
        return self._found[text]

    def __call__(self, **job: Any) -> dict[str, Any]:
        """What a worker saw."""
        return self.begin(job).result()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def _run(text: str) -> dict[str, Any]:
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES")}
    path = os.pathsep.join((str(ROOT / "tests"), str(ROOT)))
    environment |= {"PYTHONPATH": path, "TRITON_DEFAULT_FP_FUSION": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "stand_in.worker", text]
    with tempfile.TemporaryDirectory() as empty:
        environment["XDG_CACHE_HOME"] = json.loads(text).get("cache", empty)
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=SECONDS
        )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])
