"""`mindomni bench latency MODEL`: how long one request takes, stage by stage, as MLPerf's single stream does it.

One request at a time, warm-up runs first and not counted, then n runs: p50, p90, p99. Clocks and throttling are read
before and after them. The cold start comes last, in other processes (`cold`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import mindomni_rt
from mindomni_rt.checks import UNSET
from mindomni_rt.demo import DEMO_PROMPT
from mindomni_rt.devices.table import load_devices
from mindomni_rt.errors import BadRequestError
from mindomni_rt.events import GenerationResult
from mindomni_rt.figures import COLOURS, new_figure, save
from mindomni_rt.inputs.images import prepare_image
from mindomni_rt.inputs.prompts import generate_messages
from mindomni_rt.memory.footprint import Precision, weight_bytes
from mindomni_rt.memory.host import host_peak
from mindomni_rt.memory.layers import Workload
from mindomni_rt.memory.speed import cpu_rates
from mindomni_rt.options import parse_size
from mindomni_rt.pipeline import Pipeline
from mindomni_rt.request import CompleteRequest, Request
from mindomni_rt.stages import STAGES

from ..machine import NONE, clock_state, describe_machine, device_peak, free_memory, header
from ..results import Result, check_out, table, write_result
from ..roofline import measured_bound
from .cold import STARTS, cold_starts, describe_cold
from .energy import Energy, describe_energy

_SIDES = {"cpu": (512, 1536), "cuda": (8192,)}
_SECONDS = 0.5  # of each measurement of a ceiling
_RECORDED = ("height", "width", "num_inference_steps", "guidance_scale", "max_new_tokens")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("model", help="checkpoint folder, hub id, bundle, or demo (the small model)")
    parser.add_argument("--prompt", default=DEMO_PROMPT, help="default: a riddle of the small model")
    parser.add_argument("--image", type=Path, help="reference image")
    parser.add_argument("--size", metavar="WxH", help="pixels; one number for a square (default: the model's own)")
    parser.add_argument("--steps", type=int, help="default: the model's own")
    parser.add_argument("--max-new-tokens", type=int, default=300, help="at most (default: 300)")
    parser.add_argument("--guidance", type=float, default=UNSET, help="default: the model's own")
    parser.add_argument("--warmup", type=int, default=1, help="runs that are not counted (default: 1)")
    parser.add_argument("--runs", type=int, default=5, help="runs that are counted (default: 5)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16")
    parser.add_argument("--memory-budget", metavar="SIZE", help="such as 8GiB: parts take turns")
    parser.add_argument("--no-cold-start", action="store_true", help="leave out the runs in fresh processes")
    parser.add_argument("--out", type=Path, help="a .json file; .md and .png are written beside it")


def check(options: argparse.Namespace) -> None:
    """Raises BadRequestError for runs that cannot be counted and a result that has no place."""
    if options.runs < 1 or options.warmup < 0:
        raise BadRequestError(f"--runs {options.runs} --warmup {options.warmup}: expected at least 1 and 0")
    check_out(options.out)


def run(options: argparse.Namespace) -> int:
    """Measures and reports. An interrupt keeps the runs that were made."""
    check(options)
    data = measure(options)
    text = report(data)
    print(text)
    if options.out:
        write_result(options.out, data, text, partial(plot, data))
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The result, in the form that `results.read_result` reads."""
    width, height = parse_size(options.size) if options.size else (None, None)
    load = {"device": options.device, "dtype": options.dtype, "memory_budget": options.memory_budget}
    pipe = mindomni_rt.load(options.model, **load)
    asked = pipe.complete(
        Request(
            prompt=options.prompt,
            image=options.image,
            height=height,
            width=width,
            num_inference_steps=options.steps,
            guidance_scale=options.guidance,
            max_new_tokens=options.max_new_tokens,
        )
    )
    request = {name: getattr(asked, name) for name in _RECORDED} | {"image": options.image, "output": "numpy"}
    energy = Energy(pipe.backend.device)
    before = clock_state(pipe.backend.device)
    runs: list[dict[str, float]] = []
    tokens: list[int] = []
    try:
        for index in range(options.warmup + options.runs):
            with energy.over(index >= options.warmup):
                result = pipe.generate(options.prompt, seed=index, **request)
            if index >= options.warmup:
                runs.append(dict(result.timings))
                tokens.append(len(result.token_ids))
            print(f"run {index + 1} of {options.warmup + options.runs}", end="\r", file=sys.stderr)
    except KeyboardInterrupt:
        if not runs:
            raise
        print(f"interrupted; {len(runs)} runs are kept", file=sys.stderr)
    after = clock_state(pipe.backend.device)
    peak = host_peak()
    work = _workload(pipe, asked, result, tokens)
    weights = weight_bytes(pipe.config, Precision.uniform(pipe.backend.dtype))
    streamed = min(weights["language"], weights["decoder"])
    data = {
        **header("latency"),
        "model": {
            "name": Path(options.model).name,
            "config": pipe.config.to_dict(),
            "backend": pipe.backend.name,
            "device": pipe.backend.device,
            "dtype": pipe.backend.dtype,
            "weights": _weights(pipe),
        },
        "machine": describe_machine(pipe.backend.device),
        "clocks": {"before": before, "after": after},
        "request": {k: v.name if isinstance(v, Path) else v for k, v in request.items()} | {"prompt": options.prompt},
        "workload": asdict(work),
        "warmup": options.warmup,
        "tokens": tokens,
        "runs": runs,
        "ceilings": measured_ceilings(pipe.backend.device, pipe.backend.dtype, streamed),
        "peak_host_bytes": peak,
        "peak_device": device_peak(pipe.backend.device),
        "energy": energy.record(),
        "cold_start": [],
    }
    if not options.no_cold_start:
        del pipe  # a fresh process needs the memory
        free_memory()
        data["cold_start"] = cold_starts(options.model, load, {**request, "prompt": options.prompt})
    return data


def _weights(pipe: Pipeline) -> str:
    """What the language model's and the decoder's weights are stored as, "mixed" where they differ."""
    if manifest := getattr(pipe.backend, "manifest", None):
        kinds = {manifest.graphs[name].precision for name in ("language", "denoiser")}
    else:
        chosen = getattr(getattr(pipe.backend, "options", None), "precision", None)
        kinds = {pipe.backend.dtype} if chosen is None else {chosen.language, chosen.decoder}
    return kinds.pop() if len(kinds) == 1 else "mixed"


def measured_ceilings(device: str, dtype: str, weights: int) -> dict[str, Any]:
    """TFLOP/s of a square matrix product in dtype (on a CPU also in float32) and GB/s of a copy, the best of a few: a
    floor must lie below.

    device: as a backend names it. weights: bytes of the smallest weights that a stage streams; what is copied is as
    large (1 GiB at most), so that caches help the copy as they help the stage. With torch where it is installed, numpy
    elsewhere. Returns {} where neither can (a GPU without torch, a type without products).
    """
    kind, size = device.partition(":")[0], int(np.clip(weights, 2**20, 2**30))
    try:
        import torch

        from ..measure import Meter, ceilings
    except ImportError:
        if kind != "cpu" or dtype != "float32":
            return {}
        (product, copy), how = cpu_rates(size), "numpy"
    else:
        if kind not in _SIDES or (kind == "cuda" and not torch.cuda.is_available()):
            return {}
        # A CPU may lack products of 16-bit types; widening to float32 is faster there, and what the backend does.
        types = {getattr(torch, dtype), torch.float32} if kind == "cpu" else {getattr(torch, dtype)}
        rates = [ceilings(Meter(torch.device(device)), each, _SIDES[kind], size, _SECONDS) for each in types]
        product, copy = (max(found[name] or 0.0 for found in rates) for name in ("matmul", "copy"))
        how = f"torch, {torch.get_num_threads()} threads" if kind == "cpu" else "torch"
    return {"gemm_tflops": round(product, 4), "copy_gbps": round(copy, 2), "copy_bytes": size, "with": how}


def _workload(pipe: Pipeline, asked: CompleteRequest, result: GenerationResult, tokens: Sequence[int]) -> Workload:
    """The sizes of the request as it ran."""
    patches = prepare_image(asked.image, pipe.config).grid[1:] if asked.image else (0, 0)
    negative = pipe.chat.encode(generate_messages(asked.negative_prompt, think=False))
    return Workload(
        prompt_tokens=result.rounds[-1].prompt_tokens,
        new_tokens=round(float(np.mean(tokens))),
        negative_tokens=len(negative),
        patches=patches,
        height=asked.height,
        width=asked.width,
        steps=asked.num_inference_steps,
        guidance=asked.guidance_scale != 1,
    )


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """p50, p90, p99 by linear interpolation."""
    p50, p90, p99 = np.percentile(np.asarray(values, np.float64), (50, 90, 99)).tolist()
    return p50, p90, p99


def report(data: Mapping[str, Any]) -> str:
    """The result as Markdown."""
    runs, request, model = data["runs"], data["request"], data["model"]
    states = {when: ", ".join(f"{k} {v}" for k, v in state.items()) for when, state in data.get("clocks", {}).items()}
    clocks = [f"{when} the runs: {state}" for when, state in states.items()] if any(states.values()) else []
    lines = [
        f"# Latency of {model['name']}",
        "",
        f"{data['date']}, commit {data['commit']}, {model['backend']} on {model['device']} in {model['dtype']}; "
        f"{request['width']}x{request['height']}, {request['num_inference_steps']} steps, guidance "
        f"{request['guidance_scale']:g}, {np.mean(data['tokens']):.0f} tokens written. "
        f"{data['warmup']} warm-up, n = {len(runs)}.",
        "",
        "; ".join(f"{k} {v}" for k, v in data["machine"].items()),
        "",
        f"Clocks {'; '.join(clocks)}." if clocks else "Clocks and throttling before and after the runs: not available.",
        "",
    ]
    steps = request["num_inference_steps"]
    rows = {name: [r[name] for r in runs if name in r] for name in (*STAGES, "first_token", "total")}
    rows["denoising step"] = [seconds / steps for seconds in rows["denoiser"]]
    rows["first thinking token"] = rows.pop("first_token")
    names = [name for name in (*STAGES, "first thinking token", "denoising step", "total") if rows[name]]
    times = [[name, *(f"{seconds:.4f}" for seconds in percentiles(rows[name]))] for name in names]
    head = ["stage", "p50 s", "p90 s", "p99 s"]
    if found := measured_bound(Result(Path(model["name"]), dict(data)), load_devices()):
        floor = found[0]
        bounds = {**floor.floor, "denoising step": floor.floor["denoiser"] / steps, "total": floor.floor_total}
        lines[-1:] = ["", f"floor: {found[1]}; weights in {floor.scheme}.", ""]
        times = [[*row, f"{bounds[row[0]]:.4f}" if bounds.get(row[0]) else ""] for row in times]
        head.append("floor s")
    return "\n".join([*lines, table(head, times), "", table(["figure", "value"], _rates(data))])


def _rates(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    runs = data["runs"]
    behind = [r.get("language", 0.0) + r.get("vision", 0.0) - r.get("first_token", 0.0) for r in runs]
    decode = [(n - 1) / s for s, n in zip(behind, data["tokens"], strict=True) if n > 1 and s > 0]
    # A rate's slow end is its 10th and 1st percentile.
    p50, p10, p1 = np.percentile(decode, (50, 10, 1)) if decode else (0.0, 0.0, 0.0)
    host, device = data["peak_host_bytes"], data.get("peak_device")
    kinds = {"allocated": "peak_bytes", "reserved": "reserved_bytes"}
    told = ", ".join(f"{device[key] / 1e9:.2f} GB {kind}" for kind, key in kinds.items()) if device else NONE
    starts = zip(STARTS, data["cold_start"], strict=False)
    reached = data.get("ceilings") or {}
    return [
        *([("ceilings in this run", _ceilings_text(reached))] if reached else []),
        *([("decoding", f"{p50:.1f} tokens/s; p10 {p10:.1f}, p1 {p1:.1f}")] if decode else []),
        ("peak host memory", f"{host / 1e9:.2f} GB" if host else NONE),
        ("peak device memory", told),
        ("energy an image", describe_energy(data["energy"])),
        *((f"cold start, {name}", describe_cold(start)) for name, start in starts),
    ]


def _ceilings_text(found: Mapping[str, Any]) -> str:
    return f"copy {found['copy_gbps']:.1f} GB/s, matrix product {found['gemm_tflops']:.3g} TFLOP/s ({found['with']})"


def plot(data: Mapping[str, Any], path: Path) -> None:
    """Stages as one stacked bar (medians), PNG."""
    figure, axes = new_figure(9.0, 2.4)
    left = 0.0
    for index, stage in enumerate(STAGES):
        values = [r[stage] for r in data["runs"] if stage in r]
        if not values:
            continue
        width = float(np.median(values))
        axes.barh(0, width, left=left, color=COLOURS[index % len(COLOURS)], label=f"{stage} {width:.3g} s")
        left += width
    model = data["model"]
    axes.set_yticks([])
    axes.set_xlabel("seconds, median")
    axes.set_title(f"{model['name']}: {model['backend']}, {model['device']}, {model['dtype']}", fontsize=10, loc="left")
    figure.legend(loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    save(figure, path)
