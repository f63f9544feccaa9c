"""A worker as the tests call it: each job once."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import checkpoint

ROOT = Path(__file__).parents[2]
SECONDS = 1800  # of a worker; pytest's own limit ends a test before


class Runs:
    """Results of jobs by their text. folder: where checkpoints are written; shared: what other processes of the same
    run of the tests have seen already."""

    def __init__(self, folder: Path, shared: Path) -> None:
        self._folder, self._shared = folder, shared
        shared.mkdir(parents=True, exist_ok=True)
        self._server: _Server | None = None
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

    def __call__(self, **job: Any) -> dict[str, Any]:
        """What a worker saw; once for all processes."""
        text = json.dumps({"folder": job.get("folder") or self.full, **job}, sort_keys=True)
        key = hashlib.sha256(text.replace(str(self._folder), "").encode()).hexdigest()
        kept = self._shared / f"{key}.json"
        with (self._shared / f"{key}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not kept.exists():
                self._server = self._server or _Server(self._folder, self.thin)
                kept.write_text(json.dumps(self._server.run(text)))
        return dict(json.loads(kept.read_text()))

    def close(self) -> None:
        if self._server is not None:
            self._server.close()


class _Server:
    """A worker's process, and its errors in a file."""

    def __init__(self, folder: Path, thin: str) -> None:
        environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES")}
        path = os.pathsep.join((str(ROOT / "tests"), str(ROOT)))
        environment |= {"PYTHONPATH": path, "TRITON_DEFAULT_FP_FUSION": "1", "OMP_NUM_THREADS": "1"}
        environment["XDG_CACHE_HOME"] = str(folder / "cache")
        self._errors = folder / "errors.txt"
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "stand_in.worker", thin], cwd=ROOT, env=environment, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
            )  # fmt: skip

    def run(self, text: str) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        with tempfile.TemporaryDirectory() as empty:
            out = Path(empty) / "seen.json"
            job = {"cache": f"{empty}/cache", **json.loads(text), "out": str(out), "seconds": SECONDS}
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
            status = self._process.stdout.readline().strip()
            assert status == "0", (status, self._errors.read_text()[-3000:])
            return dict(json.loads(out.read_text()))

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
