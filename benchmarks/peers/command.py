"""`mindomni bench peers`: transformers, diffusers and onnxruntime beside ours, on the same weights, in one run.

Outputs are compared before anything is timed. Random weights of the published configuration ("full") or of its small
copy ("toy", for a CPU: it times the overhead of the frameworks, not their kernels), or a checkpoint's.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from mindomni_rt.backends.torch.device import working_on
from mindomni_rt.checkpoint.layout import open_checkpoint
from mindomni_rt.checks import shown
from mindomni_rt.demo import DEMO_MODELS
from mindomni_rt.errors import BadRequestError, MissingExtraError, UnsupportedDeviceError
from mindomni_rt.figures import COLOURS, new_figure, save
from mindomni_rt.loading import resolve_checkpoint
from mindomni_rt.model.mindomni import MindOmniModel, load_model
from mindomni_rt.model.random.scaled import scaled
from mindomni_rt.model.random.weights import random_model
from mindomni_rt.model.random.write import cut

from ..latency.command import check
from ..machine import clock_state, describe_machine, free_memory, header
from ..measure import PEERS, Meter, Record
from ..results import table, write_result
from ..stages import Preset
from .onnx import onnx_group
from .pairs import BOUNDS, Group, run_group
from .torch import decoder_group, language_group

_SIZES: dict[str, dict[str, Any]] = {
    "full": dict(sides=(1024,), steps=20, prompt=100, new=64, negative=100),
    "toy": dict(sides=(96,), steps=4, prompt=24, new=24, negative=12),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("model", nargs="?", help="a checkpoint, or demo (the small model); default: random weights")
    parser.add_argument("--preset", choices=tuple(_SIZES), default="toy", help="sizes of the model and the requests")
    parser.add_argument("--bundle", type=Path, default=DEMO_MODELS[0][0], help="ONNX graphs for onnxruntime")
    parser.add_argument("--rounded", type=Path, metavar="BUNDLE", help="ours from a bundle of the same checkpoint")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--dtype", choices=tuple(BOUNDS), help="default: float32 on a CPU, bfloat16 on CUDA")
    parser.add_argument("--layers", type=int, help="blocks of random weights to keep of each stack; default: all")
    parser.add_argument("--side", type=int, help="pixels a side of the painted image")
    parser.add_argument("--steps", type=int, help="denoising steps")
    parser.add_argument("--warmup", type=int, default=2, help="pairs that are not counted (default: 2)")
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
    source = resolve_checkpoint(options.model) if options.model else None
    preset = preset_of(options, source, device.type)
    meter, record = Meter(device), Record()

    def model() -> MindOmniModel:  # one for each group: its backend may take the weights over
        if source:
            return load_model(source, preset.torch_dtype, device)[0]
        return random_model(preset.config, preset.torch_dtype, device)

    groups: dict[str, Callable[[], Group]] = {
        "language": lambda: language_group(preset, model(), device, options.rounded),
        "decoder": lambda: decoder_group(preset, model(), device, options.rounded),
        "graphs": partial(onnx_group, options.bundle, device.type),
    }
    layers = [f"{options.layers} layers"] if options.layers else []
    name = source.name if source else ", ".join(["random weights", options.preset, *layers])
    name += f", ours from {options.rounded.name}" if options.rounded else ""
    data = {
        **header("peers"),
        "machine": describe_machine(str(device)),
        "clocks": {"before": clock_state(str(device))},
        "device": str(device),
        "preset": options.preset,
        "model": {
            "name": name,
            "config": preset.config.to_dict(),
            "dtype": preset.dtype,
        },
        "groups": record.data,
    }

    def run_one(make: Callable[[], Group]) -> dict[str, Any]:
        with working_on(str(device)):
            return run_group(make(), meter, options.runs, options.warmup)

    for peer, (name, make) in zip(PEERS, groups.items(), strict=True):
        record.data[name] = {"peer": peer}
        try:
            record.section(meter, name, 0, partial(run_one, make))
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


def preset_of(options: argparse.Namespace, source: Path | None, device: str) -> Preset:
    """Sizes of the model and the requests. Raises BadRequestError, BadCheckpointError."""
    if options.rounded and not options.model:
        raise BadRequestError("--rounded: the checkpoint it was built from is missing; give it as MODEL")
    if options.model and options.layers:
        raise BadRequestError("--layers cuts random weights; a checkpoint is taken whole: leave one of the two out")
    for name in ("layers", "side", "steps"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise BadRequestError(f"--{name} {value}: expected at least 1")
    config = scaled("published" if options.preset == "full" else "tiny")
    if source:
        config = open_checkpoint(source).config
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
    if not re.fullmatch(r"(cpu|cuda)(:\d{1,3})?", asked):
        raise BadRequestError(f"--device {shown(asked)}: expected cpu, cuda or cuda:N")
    if asked.startswith("cuda") and not torch.cuda.is_available():
        raise UnsupportedDeviceError("--device cuda: this PyTorch finds no CUDA device; try --device cpu --preset toy")
    return torch.device(f"cuda:{torch.cuda.current_device()}" if asked == "cuda" else asked)


def report(data: Mapping[str, Any]) -> str:
    """Markdown. On a CPU ratios alone: seconds of a toy model say nothing about the model."""
    seconds = not data["device"].startswith("cpu")
    head = ["peer", "work", "relative error", "peer / ours", "95 % interval", "n", *(["ours", "peer"] * seconds)]
    rows: list[list[Any]] = []
    for name, group in data["groups"].items():
        pairs = group.get("pairs", {})
        rows += [] if pairs else [[group["peer"], name, _why(group)]]
        for work, pair in pairs.items():
            interval = f"{pair['low']:.2f} to {pair['high']:.2f}"
            row = [group["peer"], work, f"{group['error']:.1e}", f"{pair['ratio']:.2f}", interval, pair["n"]]
            for side in ("ours", "theirs") if seconds else ():
                rate = f"{pair['rates'][side]:.1f} {pair['rates']['of']}" if "rates" in pair else ""
                row.append(rate or f"{median(pair[f'{side}_s']) * 1e3:.2f} ms")
            rows.append(row)
    lines = [
        f"# Peers, {data['model']['name']}",
        "",
        f"{data['date']}, commit {data['commit']}, {data['device']}, {data['model']['dtype']}. peer / ours: the median "
        "over pairs of runs, A B A B, with its 95 % bootstrap interval; above 1 ours is faster. Outputs were compared "
        "first.",
        "",
        "; ".join(f"{k} {v}" for k, v in (*data["machine"].items(), *data["versions"].items())),
        "",
        table(head, rows),
        "",
        *(f"- {name}: {group['note']}." for name, group in data["groups"].items() if group.get("note")),
    ]
    return "\n".join(lines) + "\n"


def _why(group: Mapping[str, Any]) -> str:
    """Why a group has no ratios."""
    if (failed := group.get("failed_pairs")) and group.get("agrees", True):
        return " ".join(f"every pair failed: {failed}".split())
    if "agrees" in group:
        text, error = ", texts differ" * (group["tokens_equal"] is False), group["error"]
        return f"DISAGREES: {'nan' if error is None else f'{error:.1e}'}, bound {group['bound']:.0e}{text}"
    return " ".join(str(group.get("missing") or f"failed: {group['failed']}").split())


def plot(data: Mapping[str, Any], path: Path) -> None:
    """Ratios with their intervals, PNG; nothing where no pair was timed."""
    rows = [
        (index, f"{group['peer']}: {work}", pair)
        for index, group in enumerate(data["groups"].values())
        for work, pair in group.get("pairs", {}).items()
    ]
    if not rows:
        return
    figure, axes = new_figure(8.0, 1.2 + 0.4 * len(rows))
    for at, (index, _, pair) in enumerate(reversed(rows)):
        colour = COLOURS[index % len(COLOURS)]
        axes.plot([pair["low"], pair["high"]], [at, at], color=colour, lw=2)
        axes.plot(pair["ratio"], at, "o", color=colour)
        axes.annotate(f"{pair['ratio']:.2f}", (pair["ratio"], at), (0, 6), textcoords="offset points", fontsize=8)
    axes.axvline(1, color="gray", lw=1, ls=":")
    axes.set_yticks(range(len(rows)), [label for _, label, _ in reversed(rows)], fontsize=8)
    axes.set_ylim(-0.5, len(rows) - 0.3)
    axes.set_xlabel("peer / ours; above 1 ours is faster")
    axes.set_title(f"{data['model']['name']}, {data['device']}, {data['model']['dtype']}", fontsize=10, loc="left")
    save(figure, path)
