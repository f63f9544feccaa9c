"""`python -m benchmarks peers`: transformers, diffusers and onnxruntime beside ours, on the same weights, in one run.

Outputs are compared before anything is timed. Random weights of the published configuration ("full") or of its small
copy ("toy", for a CPU: it times the overhead of the frameworks, not their kernels), or a checkpoint's.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from mindomni_rt.errors import BadRequestError, MindOmniError, MissingExtraError, UnsupportedDeviceError

from ..clocks import clock_state
from ..latency.command import check
from ..machine import commit, describe_machine, versions
from ..results import write_atomic, write_json
from ..schema import FORMAT
from .report import plot, report

BUNDLE = Path(__file__).resolve().parents[2] / "assets" / "shapes-world-bundle"
PEERS = {"language": "transformers", "decoder": "diffusers", "graphs": "onnxruntime"}
_MISSING = "not installed: pip install mindomni-rt[bench]"
_SIZES: dict[str, dict[str, Any]] = {
    "full": dict(sides=(1024,), steps=20, prompt=100, new=64, negative=100),
    "toy": dict(sides=(96,), steps=4, prompt=24, new=24, negative=12),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("model", nargs="?", type=Path, help="a checkpoint folder; default: random weights")
    parser.add_argument("--preset", choices=tuple(_SIZES), default="toy", help="sizes of the model and the requests")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32 on a CPU")
    parser.add_argument("--side", type=int, help="pixels of a square image; default: the preset's")
    parser.add_argument("--steps", type=int, help="denoising steps; default: the preset's")
    parser.add_argument("--bundle", type=Path, default=BUNDLE, help="ONNX graphs for onnxruntime")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--runs", type=int, default=15, help="pairs of runs")
    parser.add_argument("--out", type=Path, help="a .json file; .md and .png are written beside it")


def run(options: argparse.Namespace) -> int:
    """Measures and reports: 1 where outputs disagree or a pair failed, 2 where no peer is installed."""
    check(options)
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("torch", "bench") from error
    data: dict[str, Any] = {}
    groups = measure(options, data)
    if all("missing" in g for g in groups.values()):
        raise MissingExtraError(", ".join(PEERS.values()), "bench")
    text = report(data)
    sys.stdout.write(text)
    if options.out:
        _store(options.out, data)
        try:
            plot(data, options.out.with_suffix(".png"))
        except MissingExtraError as error:
            sys.stderr.write(f"no picture: {error}\n")
    wrong = ("failed", "failed_pairs")
    return int(any(g.get("agrees") is False or any(key in g for key in wrong) for g in groups.values()))


def _store(out: Path, data: dict[str, Any]) -> None:
    write_json(out, data)
    write_atomic(out.with_suffix(".md"), report(data))


def _sizes(options: argparse.Namespace) -> dict[str, Any]:
    """Sizes of the requests. Raises BadRequestError."""
    found = dict(_SIZES[options.preset])
    if options.side is not None:
        if options.side < 16 or options.side % 16:
            raise BadRequestError(f"--side {options.side}: expected a multiple of 16")
        found["sides"] = (options.side,)
    if options.steps is not None:
        if options.steps < 1:
            raise BadRequestError(f"--steps {options.steps}: expected at least 1")
        found["steps"] = options.steps
    return found


def measure(options: argparse.Namespace, data: dict[str, Any]) -> dict[str, Any]:
    """Fills `data`, the result, and returns its groups. A peer that is missing or fails is recorded and the others go
    on; so does an interrupt. With --out the result is stored after each group that found something."""
    import torch

    from mindomni_rt.checkpoint.layout import open_checkpoint

    from ..measure import Meter
    from ..scaled import scaled
    from ..stages import Preset
    from .onnx import onnx_group
    from .pairs import Group, run_group
    from .torch import decoder_group, language_group

    device = cuda_or_cpu(options.device)
    config = open_checkpoint(options.model).config if options.model else None
    preset = Preset(
        config=config or scaled("published" if options.preset == "full" else "tiny"),
        dtype=options.dtype or ("float32" if device.type == "cpu" else "bfloat16"),
        **_sizes(options),
    )
    meter, found = Meter(device), dict[str, Any]()
    groups: dict[str, Callable[[], Group]] = {
        "language": lambda: language_group(preset, _model(options.model, preset, device), device),
        "decoder": lambda: decoder_group(preset, _model(options.model, preset, device), device),
        "graphs": partial(onnx_group, options.bundle, device.type),
    }
    data |= {
        "kind": "peers",
        "format": FORMAT,
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "machine": describe_machine(str(device)),
        "clocks": {"before": clock_state(str(device))},
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

    def run_one(make: Callable[[], Group]) -> dict[str, Any]:
        return run_group(make(), meter, options.runs, options.warmup)

    try:
        for name, make in groups.items():
            found[name] = record(PEERS[name], partial(run_one, make))
            gc.collect()
            if meter.cuda:
                torch.cuda.empty_cache()
            if options.out and "missing" not in found[name]:
                _store(options.out, data)
    except KeyboardInterrupt:
        if not found:
            raise
        sys.stderr.write(f"interrupted; kept: {', '.join(found)}\n")
    data["clocks"]["after"] = clock_state(str(device))
    return found


def cuda_or_cpu(asked: str) -> Any:
    """--device as a torch.device with its index. Raises BadRequestError, UnsupportedDeviceError."""
    import torch

    kind, _, index = asked.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise BadRequestError(f"--device {asked}: expected cpu, cuda or cuda:N")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UnsupportedDeviceError("--device cuda: this PyTorch finds no CUDA device; try --device cpu --preset toy")
    return torch.device(f"cuda:{torch.cuda.current_device()}" if asked == "cuda" else asked)


def _model(path: Path | None, preset: Any, device: Any) -> Any:
    """A model for one group: its backend may take the weights over."""
    from mindomni_rt.model.mindomni import load_model

    from ..stages import random_model

    if path:
        return load_model(path, preset.torch_dtype, device)[0]
    return random_model(preset.config, preset.torch_dtype, device)


def record(peer: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `run` found, or why it found nothing."""
    from ..measure import described

    try:
        return run()
    except Exception as error:  # noqa: BLE001  # a peer of any version, on a GPU that may be too small for both
        if isinstance(error, MissingExtraError) or (
            isinstance(error, ImportError) and (error.name or "").partition(".")[0] == peer
        ):
            return {"peer": peer, "missing": _MISSING}
        return {"peer": peer, "failed": str(error)[:500] if isinstance(error, MindOmniError) else described(error)}
