"""`python -m benchmarks latency MODEL`: how long one request takes, stage by stage, as MLPerf's single stream does it.

One request at a time, warm-up runs first and not counted, then n runs: p50, p90, p99. The cold start is another
process, from its first instruction to its first image, twice: the second finds what the first left in caches.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

import mindomni_rt
from mindomni_rt.errors import BadRequestError
from mindomni_rt.prompts import generate_messages
from mindomni_rt.shapes import Workload

from .machine import Energy, commit, describe_machine
from .results import FORMAT, write_atomic, write_json

STAGES = ("vision", "language", "connector", "prefix", "denoiser", "vae")
PACKAGES = ("torch", "onnxruntime", "tensorrt-rtx", "tensorrt", "triton", "transformers", "diffusers", "numpy")
_PROMPT = "draw (1 + 2) things of the colour of a lemon, shaped like a wheel"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("model", help="checkpoint folder, hub id or bundle")
    parser.add_argument("--prompt", default=_PROMPT)
    parser.add_argument("--image", type=Path, help="reference image")
    parser.add_argument("--size", type=int, default=1024, help="image side in pixels")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--max-new-tokens", type=int, default=300)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype")
    parser.add_argument("--memory-budget")
    parser.add_argument("--no-cold-start", action="store_true", help="leave out the runs in fresh processes")
    parser.add_argument("--out", type=Path, help="a .json file; .md and .png are written beside it")


def run(options: argparse.Namespace) -> int:
    """Measures and reports. An interrupt keeps the runs that were made."""
    if options.runs < 1 or options.warmup < 0:
        raise BadRequestError(f"--runs {options.runs} --warmup {options.warmup}: expected at least 1 and 0")
    if options.out and options.out.suffix != ".json":
        raise BadRequestError(f"--out {options.out}: expected a name that ends in .json")
    data = measure(options)
    text = report(data)
    print(text)
    if options.out:
        write_json(options.out, data)
        write_atomic(options.out.with_suffix(".md"), text + "\n")
        plot(data, options.out.with_suffix(".png"))
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The result, in the form that `results.read_result` reads."""
    request = {
        "image": options.image,
        "height": options.size,
        "width": options.size,
        "num_inference_steps": options.steps,
        "guidance_scale": options.guidance,
        "max_new_tokens": options.max_new_tokens,
        "output": "numpy",
    }
    pipe = mindomni_rt.load(
        options.model, device=options.device, dtype=options.dtype, memory_budget=options.memory_budget
    )
    energy = Energy(pipe.backend.device)
    runs: list[dict[str, float]] = []
    tokens: list[int] = []
    try:
        for index in range(options.warmup + options.runs):
            with energy.over(index >= options.warmup):
                result = pipe.generate(options.prompt, seed=index, **request)
            if index >= options.warmup:
                runs.append(_figures(result.timings))
                tokens.append(len(result.token_ids))
            print(f"run {index + 1} of {options.warmup + options.runs}", end="\r", file=sys.stderr)
    except KeyboardInterrupt:
        if not runs:
            raise
        print(f"interrupted; {len(runs)} runs are kept", file=sys.stderr)
    messages = generate_messages(options.prompt, think=True)
    prompt_tokens = len(pipe.chat.encode(messages))  # those of a reference image are not counted
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    work = replace(
        Workload(height=options.size, width=options.size, steps=options.steps, guidance=options.guidance != 1),
        new_tokens=round(float(np.mean(tokens))),
        prompt_tokens=prompt_tokens,
    )
    return {
        "kind": "latency",
        "format": FORMAT,
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "model": {
            "name": Path(options.model).name,
            "config": pipe.config.to_dict(),
            "backend": pipe.backend.name,
            "device": pipe.backend.device,
            "dtype": pipe.backend.dtype,
        },
        "machine": describe_machine(),
        "versions": versions(),
        "request": {k: str(v) if isinstance(v, Path) else v for k, v in request.items()} | {"prompt": options.prompt},
        "workload": asdict(work),
        "warmup": options.warmup,
        "tokens": tokens,
        "runs": runs,
        "peak_host_bytes": peak,
        "peak_device_bytes": _device_peak(pipe.backend.device),
        "energy": energy.report(),
        "cold_start": [] if options.no_cold_start else [_cold(options, request) for _ in range(2)],
    }


def _figures(timings: Mapping[str, float]) -> dict[str, float]:
    """Seconds of one run by stage, "first_token" and "total" with them."""
    return {k: float(v) for k, v in timings.items() if k in (*STAGES, "first_token", "total")}


def versions() -> dict[str, str]:
    """Of Python, of this package and of those that a result may depend on."""
    found = {"python": platform.python_version(), "mindomni_rt": mindomni_rt.__version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _device_peak(device: str) -> int | None:
    """Bytes that torch held at most; None on the CPU and for backends that do not tell."""
    torch = sys.modules.get("torch")
    if not device.startswith("cuda") or torch is None:
        return None
    return int(torch.cuda.max_memory_allocated(device))


_COLD = """
import json, sys, time
began = float(sys.argv[1])
import mindomni_rt
request = json.loads(sys.argv[2])
pipe = mindomni_rt.load(request.pop("model"), device=request.pop("device"), dtype=request.pop("dtype"))
loaded = time.time()
pipe.generate(request.pop("prompt"), seed=0, **request)
print(json.dumps({"load": loaded - began, "first_image": time.time() - began}))
"""


def _cold(options: argparse.Namespace, request: Mapping[str, Any]) -> dict[str, float]:
    """Seconds from the start of a fresh process to the loaded model and to the first image."""
    asked = {k: str(v) if isinstance(v, Path) else v for k, v in request.items()}
    asked |= {"model": str(options.model), "device": options.device, "dtype": options.dtype, "prompt": options.prompt}
    done = subprocess.run(
        [sys.executable, "-c", _COLD, str(time.time()), json.dumps(asked)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise BadRequestError(f"the cold start failed: {done.stderr.strip().splitlines()[-1:]}")
    return {k: round(v, 3) for k, v in json.loads(done.stdout.splitlines()[-1]).items()}


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """p50, p90, p99 by linear interpolation."""
    p50, p90, p99 = np.percentile(np.asarray(values, np.float64), (50, 90, 99))
    return float(p50), float(p90), float(p99)


def report(data: Mapping[str, Any]) -> str:
    """The result as Markdown."""
    runs, request, model = data["runs"], data["request"], data["model"]
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
        "| stage | p50 s | p90 s | p99 s |",
        "| --- | --- | --- | --- |",
    ]
    for name in (*STAGES, "first_token", "total"):
        values = [r[name] for r in runs if name in r]
        if values:
            p50, p90, p99 = percentiles(values)
            lines.append(f"| {name} | {p50:.4f} | {p90:.4f} | {p99:.4f} |")
    lines += ["", "| figure | value |", "| --- | --- |"]
    lines += [f"| {name} | {value} |" for name, value in _rates(data)]
    return "\n".join(lines)


def _rates(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    runs, steps = data["runs"], data["request"]["num_inference_steps"]
    decode = [
        (count - 1) / (r["language"] - (r["first_token"] - r.get("vision", 0.0)))
        for r, count in zip(runs, data["tokens"], strict=True)
        if count > 1 and r.get("language", 0) > r.get("first_token", 0) - r.get("vision", 0.0)
    ]
    out = [("denoising step", f"{np.median([r['denoiser'] for r in runs]) / steps * 1000:.2f} ms")]
    if decode:
        out.append(("decoding", f"{np.median(decode):.1f} tokens/s"))
    out.append(("peak host memory", f"{data['peak_host_bytes'] / 1e9:.2f} GB"))
    device = data["peak_device_bytes"]
    out.append(("peak device memory", f"{device / 1e9:.2f} GB" if device else "not available"))
    out.append(("energy an image", data["energy"]))
    for index, cold in enumerate(data["cold_start"]):
        name = ("first", "second")[index]
        out.append((f"cold start, {name} run", f"loaded {cold['load']:.2f} s, first image {cold['first_image']:.2f} s"))
    return out


def plot(data: Mapping[str, Any], path: Path) -> None:
    """Stages as one stacked bar (medians), PNG."""
    from .figures import COLOURS, new_figure, save

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
