"""Peak memory of each stage on the CPU backend, to hold the planner's predictions to.

Runs in a process of its own, so that the baseline (interpreter, torch) is known and can be subtracted.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mindomni_rt.checkpoint.config import ModelConfig
from mindomni_rt.errors import UnsupportedDeviceError
from mindomni_rt.memory.layers import STAGES, Workload

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident() -> tuple[int, int]:
    """(bytes resident now, most since the last `restart`) of this process; Linux only."""
    values = dict(line.split(":", 1) for line in _STATUS.read_text(encoding="utf-8").splitlines() if ":" in line)
    return tuple(int(values[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM"))  # type: ignore[return-value]


def restart() -> None:
    """Forgets the highest value so far."""
    try:
        _CLEAR.write_text("5", encoding="utf-8")
    except OSError as error:
        raise UnsupportedDeviceError("peak memory by stage needs /proc/self/clear_refs (Linux)") from error


def run_stages(config: ModelConfig, work: Workload, dtype: str) -> dict[str, int]:
    """Runs the six stages on random weights; bytes above the baseline at each stage's peak, and of the weights."""
    import torch

    from mindomni_rt.backends.torch.backend import TorchBackend
    from mindomni_rt.benchmarks.stages import Stages
    from mindomni_rt.model.random.weights import random_model

    base = resident()[0]
    model = random_model(config, getattr(torch, dtype), "cpu")
    model.vae.float()
    gc.collect()
    peaks = {"weights": resident()[0] - base}

    @contextmanager
    def frame(name: str) -> Iterator[None]:
        restart()
        yield
        stage = name.partition(".")[0]
        peaks[stage] = max(peaks.get(stage, 0), resident()[1] - base)

    Stages(TorchBackend(model), work).run(frame)
    return peaks


def measure(config: ModelConfig, work: Workload, dtype: str = "float32") -> dict[str, int]:
    """`run_stages` in a fresh process whose allocator gives freed memory back at once."""
    request = json.dumps({"config": config.to_dict(), "work": asdict(work), "dtype": dtype})
    # glibc keeps freed blocks below its threshold; a low one makes resident memory follow the tensors.
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, __file__],
        input=request,
        text=True,
        capture_output=True,
        env=environment,
        check=False,
    )
    if done.returncode:
        raise UnsupportedDeviceError(f"measuring failed: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    peaks = json.loads(done.stdout.splitlines()[-1])
    return {key: peaks[key] for key in ("weights", *STAGES) if key in peaks}


def _main() -> None:
    from mindomni_rt.model.random.scaled import scaled

    data = json.loads(sys.stdin.read())
    # A small run first: what libraries load on first use is then part of the baseline.
    warm = Workload(prompt_tokens=70, new_tokens=2, negative_tokens=8, height=64, width=64, steps=1, patches=(8, 8))
    run_stages(scaled("tiny"), warm, data["dtype"])
    gc.collect()
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data["work"].items()}
    work = Workload(**values)
    sys.stdout.write(json.dumps(run_stages(ModelConfig.from_dict(data["config"]), work, data["dtype"])) + "\n")


if __name__ == "__main__":
    _main()
