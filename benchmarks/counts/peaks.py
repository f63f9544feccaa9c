"""Peak memory of each stage on the CPU backend, beside what the planner says: `python -m benchmarks plan --check`.

Runs in a process of its own, so that the baseline (interpreter, torch) is known and can be taken off.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

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

    from mindomni_rt.backends.base import DenoiseRequest, LanguageRequest
    from mindomni_rt.backends.torch.backend import TorchBackend
    from mindomni_rt.inputs.images import ImagePatches
    from mindomni_rt.model.mindomni import MindOmniModel
    from mindomni_rt.sampling.decode import generate_tokens
    from mindomni_rt.sampling.denoise import denoise
    from mindomni_rt.sampling.schedule import timesteps

    base = resident()[0]
    with torch.device("meta"):
        model = MindOmniModel(config)
    model = model.to(getattr(torch, dtype))
    model.vae.float()
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02)
    backend = TorchBackend(model.eval().requires_grad_(False))
    gc.collect()
    peaks = {"weights": resident()[0] - base}

    def stage(name: str, run: Callable[[], Any]) -> Any:
        restart()
        result = run()
        peaks[name] = max(peaks.get(name, 0), resident()[1] - base)
        return result

    def write(tokens: int, new: int, embeds: Any = None) -> Any:
        ids = np.zeros(tokens, np.int64)
        if embeds is not None:
            ids[: embeds.shape[0]] = config.language.image_token_id
        places = np.broadcast_to(np.arange(tokens), (3, tokens)).copy()
        request = LanguageRequest(
            token_ids=ids, positions=places, next_position=tokens, image_embeds=embeds, max_new_tokens=new
        )
        language = backend.language(request)
        return language.hidden(len(list(generate_tokens(language))))

    embeds = None
    if work.patches[0]:
        grid = (1, *work.patches)
        patches = ImagePatches(np.zeros((work.patches[0] * work.patches[1], config.vision.patch_dim), np.float32), grid)
        embeds = stage("vision", lambda: backend.vision(patches))
    times = timesteps(work.steps)
    prefixes: list[Any] = []
    for tokens, new in ((work.prompt_tokens, work.new_tokens), (work.negative_tokens, 0))[: len(work.branches)]:
        hidden = stage("language", partial(write, tokens, new, None if prefixes else embeds))
        condition = stage("connector", partial(backend.connector, hidden))
        prefixes.append(stage("prefix", partial(backend.prefix, condition, times[:-1], work.image_tokens)))
    hidden = condition = embeds = None
    noise = np.zeros((work.images, config.decoder.latent_channels, work.height // 8, work.width // 8), np.float32)
    request = DenoiseRequest(
        latents=noise,
        times=times,
        guided=prefixes[0],
        unguided=prefixes[1] if len(prefixes) > 1 else None,
        guidance_scale=3.0,
    )

    def paint() -> Any:
        for state in denoise(backend, request):
            final = state.latents
        return final

    latents = stage("denoiser", paint)
    stage("vae", lambda: backend.vae(latents))
    return peaks


def measure(config: ModelConfig, work: Workload, dtype: str = "float32") -> dict[str, int]:
    """`run_stages` in a fresh process whose allocator gives freed memory back at once."""
    request = json.dumps({"config": config.to_dict(), "work": asdict(work), "dtype": dtype})
    # glibc keeps freed blocks below its threshold; a low one makes resident memory follow the tensors.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-m", "mindomni_rt.benchmarks.counts.peaks"],
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
    from ..scaled import scaled

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
