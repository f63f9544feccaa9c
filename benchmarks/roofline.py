"""`mindomni bench roofline`: floors and predictions, the cost model times the device sheet, beside results."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from mindomni_rt.checkpoint.config import ModelConfig, published
from mindomni_rt.devices.table import Device, Sheet, load_devices, with_figures
from mindomni_rt.errors import OutOfMemoryError
from mindomni_rt.figures import COLOURS, log_axis, new_figure, save
from mindomni_rt.memory.costs import SCHEMES
from mindomni_rt.memory.footprint import Precision
from mindomni_rt.memory.layers import STAGES, Workload
from mindomni_rt.memory.planner import gigabytes, plan
from mindomni_rt.memory.roofline import Bound, bound
from mindomni_rt.options import parse_size

from .results import Result, all_results, check_file, table

DEFAULT_SCHEMES = ("bf16", "w8a8", "w4a4+attn8")
Measured = tuple[Result, Bound, str]
"""A result, the floor of what it ran, and what that floor rests on."""
_STORED = {  # weights of language model, output embedding and decoder
    "fp32": ("float32", "float32", "float32"),
    "bf16": ("bfloat16", "bfloat16", "bfloat16"),
    "w8a8": ("int8", "int8", "int8"),
    "w4a4+attn8": ("int4", "int8", "int4"),
}

# Weights of a result to the scheme of its floor.
_MEASURED = {"float32": "fp32", "fp32": "fp32", "bfloat16": "bf16", "float16": "bf16", "bf16": "bf16", "fp16": "bf16"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--device", action="append", help="a key of devices.toml; repeatable; default: all")
    parser.add_argument("--size", default="1024", metavar="WxH", help="pixels; one number for a square")
    parser.add_argument("--steps", type=int, default=50, help="default: 50")
    parser.add_argument("--new-tokens", type=int, default=300, help="of thinking (default: 300)")
    parser.add_argument("--plot", type=Path, help="a PNG")


def run(options: argparse.Namespace) -> int:
    """Prints both tables."""
    check_file(options.plot, ".png", "--plot")
    sheet, config = load_devices(), published()
    width, height = parse_size(options.size)
    work = Workload(height=height, width=width, steps=options.steps, new_tokens=options.new_tokens)
    choices = [(device, scheme) for device in with_figures(options.device, sheet) for scheme in DEFAULT_SCHEMES]
    found = [b for d, s in choices if (b := bound(config, work, d, s, sheet.efficiency)) is not None]
    memory = {(d.name, s): memory_note(config, work, d, s) for d, s in choices}
    request = f"published sizes, {width}x{height}, {options.steps} steps"
    conditions = " + ".join(f"{n} condition tokens" for n in work.branches)
    written = f"{work.prompt_tokens} prompt and {work.new_tokens} thinking tokens"
    sys.stdout.write(f"{request}, {conditions}, {written}\n\n{bound_table(found, memory)}\n")
    rows = [(r, *m) for r in all_results() if (m := measured_bound(r, sheet)) is not None]
    if rows:
        sys.stdout.write(f"\n{measured_table(rows)}\n")
    if options.plot:
        same = [row for row in rows if row[0].config == config and row[0].workload == work]
        plot(found, same, options.plot, f"{request}, {options.new_tokens} new tokens")
    return 0


def measured_bound(result: Result, sheet: Sheet) -> tuple[Bound, str] | None:
    """The floor of a measured run and what it rests on: the run's own measured ceilings, else the device sheet.

    None where neither is known, as for 8- and 4-bit weights, whose products no run measures: onnxruntime multiplies
    both in 8 bits on a CPU. The cost model uses the result's own configuration and request.
    """
    model = result.data["model"]
    scheme = _MEASURED.get(model.get("weights", model["dtype"]))
    if scheme is None:
        return None
    ceilings = result.data.get("ceilings") or {}
    device = sheet.named(str(result.data.get("machine", {}).get("gpu") or ""))
    basis = "device sheet"
    if ceilings.get("gemm_tflops"):
        key = SCHEMES[scheme].gemm[0]
        device = Device(
            key="measured",
            name=device.name if device else result.machine,
            memory=1.0,
            bandwidth=float(ceilings["copy_gbps"]),
            peak={key: float(ceilings["gemm_tflops"])},
            source="measured in the same run",
        )
        basis = "ceilings measured in the same run"
    found = bound(result.config, result.workload, device, scheme, sheet.efficiency) if device else None
    return (found, basis) if found else None


def bound_table(bounds: Sequence[Bound], fits: Mapping[tuple[str, str], str]) -> str:
    """One row a device and precision; every time that nobody measured says "prediction" in its heading."""
    totals = ["total floor (s)", "total prediction (s)", "memory (plan)"]
    rows = [
        [row.device, row.scheme, *(_seconds_text(row.floor[s]) for s in STAGES), _seconds_text(row.floor_total),
         _seconds_text(row.prediction_total), fits.get((row.device, row.scheme), "-")]
        for row in bounds
    ]  # fmt: skip
    return table(["device", "precision", *(f"{s} floor (s)" for s in STAGES), *totals], rows)


def memory_note(config: ModelConfig, work: Workload, device: Device, scheme: str) -> str:
    """Whether a request fits the device: what its weights stay or are swapped at, by the planner. A prediction."""
    weights = _STORED[scheme]
    precision = Precision(language=weights[0], head=weights[1], decoder=weights[2], vae="bfloat16")
    try:
        found = plan(config, work, precision=precision, budget=device.bytes, reserve=device.reserve)
    except OutOfMemoryError:
        return "does not fit"
    return f"{gigabytes(found.peak)}, {'all loaded' if not found.moved else 'swaps ' + gigabytes(found.moved)}"


def measured_table(rows: Sequence[Measured]) -> str:
    """Measured medians beside the floor of the same request, with the ratio for each stage and in all."""
    cells = [
        [result.path.name, result.machine, stage, f"{seconds:.4g}", f"{floor:.4g}", f"{seconds / floor:.2f}", basis]
        for result, found, basis in rows
        for stage in STAGES
        if (seconds := result.median(stage)) and (floor := found.floor[stage])
    ]
    head = ["result", "machine", "stage", "measured (s)", "floor (s)", "measured / floor", "floor rests on"]
    return table(head, cells)


def _seconds_text(value: float) -> str:
    return "-" if value == 0 else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def plot(bounds: Sequence[Bound], measured: Sequence[Measured], path: Path, title: str) -> None:
    """A dot plot, seconds an image on a log axis: floor (open), prediction (filled), measured (star). PNG at path.

    measured: runs of the same request.
    """
    devices = list(dict.fromkeys(b.device for b in bounds))
    schemes = list(dict.fromkeys(b.scheme for b in bounds))

    def row(b: Bound) -> float:
        return len(devices) - 1 - devices.index(b.device) + 0.22 * (len(schemes) / 2 - 0.5 - schemes.index(b.scheme))

    figure, axes = new_figure(9.0, 1.6 + 0.62 * len(devices))
    for b in bounds:
        at, colour = row(b), COLOURS[schemes.index(b.scheme) % len(COLOURS)]
        axes.plot([b.floor_total, b.prediction_total], [at, at], color=colour, lw=1.2, alpha=0.5, zorder=1)
        axes.plot(b.floor_total, at, "o", mfc="white", mec=colour, ms=7, zorder=2)
        axes.plot(b.prediction_total, at, "o", color=colour, ms=7, zorder=2)
        axes.annotate(
            _seconds_text(b.prediction_total), (b.prediction_total, at), (6, -3), textcoords="offset points", fontsize=7
        )
    for result, b, _ in measured:
        if b.device in devices and b.scheme in schemes:
            axes.plot(result.median("total"), row(b), "*", color="black", ms=12, zorder=3)
    log_axis(axes)
    axes.set_yticks(range(len(devices)), devices[::-1])
    axes.set_xlabel("seconds for one request (log)")
    axes.set_title(title, fontsize=10, loc="left")
    axes.grid(axis="x", which="both", alpha=0.2)
    axes.set_ylim(-0.6, len(devices) - 0.4)
    for index, scheme in enumerate(schemes):
        axes.plot([], [], "s", color=COLOURS[index % len(COLOURS)], label=scheme)
    axes.plot([], [], "o", mfc="white", mec="gray", label="floor")
    axes.plot([], [], "o", color="gray", label="prediction")
    axes.plot([], [], "*", color="black", ms=10, label="measured" if measured else "measured (none yet)")
    figure.legend(loc="outside lower center", ncols=3 + len(schemes), fontsize=8, frameon=False)
    save(figure, path)
