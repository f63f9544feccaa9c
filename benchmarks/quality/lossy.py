"""`mindomni bench lossy MODEL`: what each lossy option of `generate` costs, against the exact 50 steps.

Same riddles, same seeds, one run: PSNR of the picture, cosine of the latents, share of right pictures (`shapes` reads
them), and the time of the denoising loop as a share of the exact one's on this machine.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mindomni_rt
from mindomni_rt.errors import BadRequestError
from mindomni_rt.loading import resolve_checkpoint

from .. import results
from ..machine import commit, describe_machine
from .judge import likeness, riddles, share

EXACT: dict[str, Any] = {"num_inference_steps": 50}
ARMS: dict[str, dict[str, Any]] = {
    "euler, 28 steps": {"num_inference_steps": 28},
    "euler, 25 steps": {"num_inference_steps": 25},
    "multistep, 28 steps": {"num_inference_steps": 28, "solver": "multistep"},
    "multistep, 25 steps": {"num_inference_steps": 25, "solver": "multistep"},
    "guidance interval 0:0.6": {"num_inference_steps": 50, "guidance_interval": (0.0, 0.6)},
    "guidance interval 0.2:0.8": {"num_inference_steps": 50, "guidance_interval": (0.2, 0.8)},
    "step cache 0.05": {"num_inference_steps": 50, "step_cache": 0.05},
    "step cache 0.1": {"num_inference_steps": 50, "step_cache": 0.1},
    "step cache 0.2": {"num_inference_steps": 50, "step_cache": 0.2},
}


def measure(model: Path, n: int, guidance: float) -> dict[str, dict[str, float]]:
    """Figures of the exact run and of each arm. Raises BadRequestError for n < 1."""
    asked = riddles()[:n]
    if n < 1:
        raise BadRequestError(f"n = {n}: expected at least 1")
    pipe = mindomni_rt.load(model, device="auto", fast=True)
    common: dict[str, Any] = {"guidance_scale": guidance, "max_new_tokens": 48, "output": "numpy"}
    painted: dict[str, list[Any]] = {name: [] for name in ("exact", *ARMS)}
    for seed, riddle in enumerate(asked):
        for name, options in (("exact", EXACT), *ARMS.items()):
            painted[name].append(pipe.generate(riddle.instruction, seed=seed, **common, **options))
    seconds = {name: sum(r.timings["denoiser"] for r in found) for name, found in painted.items()}
    return {
        name: {
            **likeness(found, painted["exact"]),
            "right": round(share(asked, [r.images[0] for r in found]), 4),
            "time": round(seconds[name] / seconds["exact"], 3),
        }
        for name, found in painted.items()
    }


def table(found: dict[str, dict[str, float]]) -> str:
    """Figures as Markdown."""
    rows = [
        [name, f"{row['psnr']:.1f}", f"{row['latent_cosine']:.4f}", f"{100 * row['right']:.0f} %", f"{row['time']:.2f}"]
        for name, row in found.items()
    ]
    return results.table(["option", "PSNR dB", "latent cosine", "right", "time of the loop"], rows)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("model", help="a checkpoint of the small world: demo (the small model), or what training wrote")
    parser.add_argument("--n", type=int, help="riddles (24), or pictures with --precisions (320)")
    parser.add_argument("--precisions", action="store_true", help="what rounding costs, alone and with the options")
    parser.add_argument("--guidance", type=float, default=3.0, help="default: 3")
    parser.add_argument("--out", type=Path, help="a .json file; the table goes beside it as .md")


def run(options: argparse.Namespace) -> int:
    """Measures and reports."""
    results.check_out(options.out)
    n = options.n if options.n is not None else 320 if options.precisions else 24
    model = resolve_checkpoint(options.model)
    asked = {"model": model.name, "n": n, "guidance": options.guidance}
    record = {"date": time.strftime("%Y-%m-%d"), "commit": commit(), "machine": describe_machine(), **asked}

    def store(found: dict[str, Any], text: str) -> None:
        if options.out:
            results.write_result(options.out, {**record, "options": found}, text)

    if options.precisions:
        text = _precisions(options, model, asked, store)
    else:
        found = measure(model, n, options.guidance)
        store(found, text := table(found))
    sys.stdout.write(text + "\n")
    return 0


def _precisions(
    options: argparse.Namespace, model: Path, asked: dict[str, Any], store: Callable[[dict[str, Any], str], None]
) -> str:
    """The table. Each arm is stored as it ends; the same command goes on with those that are missing."""
    from . import precisions

    found: dict[str, Any] = {}
    if options.out and options.out.exists():
        before = results.read_json(options.out)
        if any(before.get(name) != value for name, value in asked.items()):
            raise BadRequestError(f"{options.out} is of another model, n or guidance; name another --out")
        found = before["options"]
    if missing := {name: arm for name, arm in precisions.arms().items() if name not in found}:
        bench = precisions.Bench(model, asked["n"], options.guidance)
        for name, (kind, options_of) in missing.items():
            found[name] = bench.figures(kind, options_of)
            store(found, precisions.table(found))
    return precisions.table(found)
