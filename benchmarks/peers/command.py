"""`python -m benchmarks peers`: transformers, diffusers and onnxruntime beside ours, on the same weights, in one run.

Outputs are compared before anything is timed. Random weights of the published configuration ("full") or of its small
copy ("toy", for a CPU: it times the overhead of the frameworks, not their kernels), or a checkpoint's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mindomni_rt.checkpoint.layout import open_checkpoint
from mindomni_rt.errors import BadRequestError, MissingExtraError, UnsupportedDeviceError
from mindomni_rt.model.mindomni import MindOmniModel, load_model
from mindomni_rt.model.random.scaled import scaled
from mindomni_rt.model.random.weights import random_model
from mindomni_rt.model.random.write import cut

from ..latency.command import check
from ..machine import clock_state, describe_machine, free_memory, header
from ..measure import PEERS, Meter, Record
from ..results import write_result
from ..stages import Preset
from .onnx import onnx_group
from .pairs import BOUNDS, Group, run_group
from .report import plot, report
from .torch import decoder_group, language_group

BUNDLE = Path(__file__).resolve().parents[2] / "assets" / "shapes-world-bundle"
_SIZES: dict[str, dict[str, Any]] = {
    "full": dict(sides=(1024,), steps=20, prompt=100, new=64, negative=100),
    "toy": dict(sides=(96,), steps=4, prompt=24, new=24, negative=12),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("model", nargs="?", type=Path, help="a checkpoint folder; default: random weights")
    parser.add_argument("--preset", choices=tuple(_SIZES), default="toy", help="sizes of the model and the requests")
    parser.add_argument("--bundle", type=Path, default=BUNDLE, help="ONNX graphs for onnxruntime")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--dtype", choices=tuple(BOUNDS), help="default: float32 on a CPU, bfloat16 on CUDA")
    parser.add_argument("--layers", type=int, help="blocks of random weights to keep of each stack; default: all")
    parser.add_argument("--side", type=int, help="pixels a side of the painted image")
    parser.add_argument("--steps", type=int, help="denoising steps")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--runs", type=int, default=15, help="pairs of runs")
    parser.add_argument("--out", type=Path, help="a .json file; .md and .png are written beside it")


def run(options: argparse.Namespace) -> int:
    """Measures and reports: 1 where outputs disagree or a pair failed, 2 where no peer is installed."""
    check(options)
    data = measure(options)
    groups = data["groups"].values()
    if all("missing" in g for g in groups):
        raise MissingExtraError(", ".join(PEERS), "bench")
    text = report(data)
    sys.stdout.write(text)
    if options.out:
        write_result(options.out, data, text, partial(plot, data))
    wrong = ("failed", "failed_pairs")
    return int(any(g.get("agrees") is False or any(key in g for key in wrong) for g in groups))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The result. A peer that is missing or fails is recorded and the others go on; an interrupt keeps those before it.
    With --out the result is stored after each group that found something."""
    device = cuda_or_cpu(options.device)
    preset = preset_of(options, device.type)
    meter, record = Meter(device), Record()

    def model() -> MindOmniModel:  # one for each group: its backend may take the weights over
        if options.model:
            return load_model(options.model, preset.torch_dtype, device)[0]
        return random_model(preset.config, preset.torch_dtype, device)

    groups: dict[str, Callable[[], Group]] = {
        "language": lambda: language_group(preset, model(), device),
        "decoder": lambda: decoder_group(preset, model(), device),
        "graphs": partial(onnx_group, options.bundle, device.type),
    }
    layers = [f"{options.layers} layers"] if options.layers else []
    data = {
        **header("peers"),
        "machine": describe_machine(str(device)),
        "clocks": {"before": clock_state(str(device))},
        "device": str(device),
        "preset": options.preset,
        "model": {
            "name": options.model.name if options.model else ", ".join(["random weights", options.preset, *layers]),
            "config": preset.config.to_dict(),
            "dtype": preset.dtype,
        },
        "groups": record.data,
    }

    for peer, (name, make) in zip(PEERS, groups.items(), strict=True):
        record.data[name] = {"peer": peer}
        try:
            record.section(meter, name, 0, lambda make=make: run_group(make(), meter, options.runs, options.warmup))
        except KeyboardInterrupt:
            del record.data[name]
            if not record.data:
                raise
            sys.stderr.write(f"interrupted; kept: {', '.join(record.data)}\n")
            break
        free_memory()
        if options.out and "missing" not in record.data[name]:
            write_result(options.out, data, report(data))
    data["clocks"]["after"] = clock_state(str(device))
    return data


def preset_of(options: argparse.Namespace, device: str) -> Preset:
    """Sizes of the model and the requests. Raises BadRequestError, BadCheckpointError."""
    if options.model and options.layers:
        raise BadRequestError("--layers cuts random weights; a checkpoint is taken whole: leave one of the two out")
    for name in ("layers", "side", "steps"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise BadRequestError(f"--{name} {value}: expected at least 1")
    config = scaled("published" if options.preset == "full" else "tiny")
    if options.model:
        config = open_checkpoint(options.model).config
    elif options.layers:
        config = cut(config, options.layers)
    dtype = options.dtype or ("float32" if device == "cpu" else "bfloat16")
    preset = Preset(config=config, dtype=dtype, **_SIZES[options.preset])
    sides, steps = (options.side,) if options.side else preset.sides, options.steps or preset.steps
    preset = replace(preset, sides=sides, steps=steps)
    preset.work()  # its checks, before a model is made
    return preset


def cuda_or_cpu(asked: str) -> torch.device:
    """--device as a torch.device with its index. Raises BadRequestError, UnsupportedDeviceError."""
    kind, _, index = asked.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise BadRequestError(f"--device {asked}: expected cpu, cuda or cuda:N")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UnsupportedDeviceError("--device cuda: this PyTorch finds no CUDA device; try --device cpu --preset toy")
    return torch.device(f"cuda:{torch.cuda.current_device()}" if asked == "cuda" else asked)
