"""`python -m benchmarks peers`: transformers, diffusers and onnxruntime beside ours, on the same weights, in one run.

Outputs are compared before anything is timed. Random weights of the published configuration ("full") or of its small
copy ("toy", for a CPU: there the overhead of the frameworks is timed, not their kernels), or a checkpoint's.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mindomni_rt.errors import BadRequestError, MindOmniError, MissingExtraError, UnsupportedDeviceError

from ..clocks import clock_state
from ..latency.command import check, versions
from ..machine import commit, describe_machine
from ..results import FORMAT, write_atomic, write_json
from .report import plot, report

BUNDLE = Path(__file__).resolve().parents[2] / "assets" / "shapes-world-bundle"
PEERS = {"language": "transformers", "decoder": "diffusers", "graphs": "onnxruntime"}
_MISSING = "not installed: pip install mindomni-rt[bench]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("model", nargs="?", type=Path, help="a checkpoint folder; default: random weights")
    parser.add_argument("--preset", choices=("toy", "full"), default="toy", help="sizes of the model and the requests")
    parser.add_argument("--bundle", type=Path, default=BUNDLE, help="ONNX graphs for onnxruntime")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--runs", type=int, default=15, help="pairs of runs")
    parser.add_argument("--out", type=Path, help="a .json file; .md and .png are written beside it")


def run(options: argparse.Namespace) -> int:
    """Measures and reports: 1 where outputs disagree or a pair failed, 2 where no peer is installed."""
    check(options)
    data = measure(options)
    groups = data["groups"]
    if all("missing" in g for g in groups.values()):
        raise MissingExtraError(", ".join(PEERS.values()), "bench")
    text = report(data)
    sys.stdout.write(text)
    if options.out:
        write_json(options.out, data)
        write_atomic(options.out.with_suffix(".md"), text)
        try:
            plot(data, options.out.with_suffix(".png"))
        except MissingExtraError as error:
            sys.stderr.write(f"no picture: {error}\n")
    return int(any("failed" in g or g.get("agrees") is False for g in groups.values()))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The result. A peer that is missing or fails is recorded and the others go on; so does an interrupt."""
    try:
        import torch
    except ImportError as error:
        raise MissingExtraError("torch", "bench") from error
    from mindomni_rt.checkpoint.layout import open_checkpoint

    from ..gpu.measure import Meter
    from ..gpu.stages import Preset
    from ..scaled import scaled
    from .onnx import onnx_group
    from .pairs import Group, run_group
    from .torch import decoder_group, language_group

    device = torch.device(_device(options.device))
    if options.preset == "full":
        sizes: dict[str, Any] = dict(sides=(1024,), steps=20, prompt=100, new=64, negative=100)
    else:
        sizes = dict(sides=(96,), steps=4, prompt=24, new=24, negative=12)
    config = scaled("published" if options.preset == "full" else "tiny")
    preset = Preset(config=config, dtype="float32" if device.type == "cpu" else "bfloat16", **sizes)
    if options.model:
        preset = replace(preset, config=open_checkpoint(options.model).config)
    meter = Meter(device)
    groups: dict[str, Callable[[], Group]] = {
        "language": lambda: language_group(preset, _model(options.model, preset, device), device),
        "decoder": lambda: decoder_group(preset, _model(options.model, preset, device), device),
        "graphs": partial(onnx_group, options.bundle, device.type),
    }

    def run_one(make: Callable[[], Group]) -> dict[str, Any]:
        return run_group(make(), meter, options.runs, options.warmup)

    before, found = clock_state(), dict[str, Any]()
    try:
        for name, make in groups.items():
            found[name] = _record(PEERS[name], partial(run_one, make))
            gc.collect()
            if meter.cuda:
                torch.cuda.empty_cache()
    except KeyboardInterrupt:
        if not found:
            raise
        sys.stderr.write(f"interrupted; kept: {', '.join(found)}\n")
    return {
        "kind": "peers",
        "format": FORMAT,
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "machine": describe_machine(),
        "clocks": {"before": before, "after": clock_state()},
        "versions": versions(),
        "device": str(device),
        "preset": options.preset,
        "model": {
            "name": options.model.name if options.model else f"random weights, {options.preset}",
            "config": preset.config.to_dict(),
            "dtype": preset.dtype,
        },
        "groups": found,
    }


def _device(asked: str) -> str:
    import torch

    kind, _, index = asked.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise BadRequestError(f"--device {asked}: expected cpu, cuda or cuda:N")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UnsupportedDeviceError("--device cuda: this PyTorch finds no CUDA device; try --device cpu --preset toy")
    return f"cuda:{torch.cuda.current_device()}" if asked == "cuda" else asked


def _model(path: Path | None, preset: Any, device: Any) -> Any:
    """A model for one group: its backend may take the weights over."""
    from mindomni_rt.model.mindomni import load_model

    from ..gpu.stages import random_model

    return load_model(path, preset.torch_dtype, device)[0] if path else random_model(preset, device)


def _record(peer: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `run` found, or why it found nothing."""
    try:
        return run()
    except ImportError as error:
        if isinstance(error, MissingExtraError) or (error.name or "").partition(".")[0] == peer:
            return {"peer": peer, "missing": _MISSING}
        return {"peer": peer, "failed": f"{type(error).__name__}: {error}"[:500]}
    except MindOmniError as error:
        return {"peer": peer, "failed": str(error)[:500]}
    except Exception as error:  # noqa: BLE001  # a peer of any version, on a GPU that may be too small for both
        memory = "out of memory: " if isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__ else ""
        return {"peer": peer, "failed": f"{memory}{type(error).__name__}: {error}"[:500]}
