"""`python -m benchmarks roofline`: floors and predictions, the cost model times the device sheet, beside results."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mindomni_rt.checkpoint.config import ModelConfig, published
from mindomni_rt.devices.table import Device, Sheet, load_devices, with_figures
from mindomni_rt.errors import OutOfMemoryError
from mindomni_rt.memory.footprint import Precision
from mindomni_rt.memory.layers import STAGES, Workload
from mindomni_rt.memory.planner import gigabytes, plan
from mindomni_rt.options import parse_size

from ..results import Result, all_results
from .costs import SCHEMES, Op, Scheme, StageCost, request_costs

DEFAULT_SCHEMES = ("bf16", "w8a8", "w4a4+attn8")
Measured = tuple[str, str, float]
_STORED = {  # weights of language model, output embedding and decoder
    "fp32": ("float32", "float32", "float32"),
    "bf16": ("bfloat16", "bfloat16", "bfloat16"),
    "w8a8": ("int8", "int8", "int8"),
    "w4a4+attn8": ("int4", "int8", "int4"),
}
_DECODE = {"w8a8": "w8a8", "w8a8+attn8": "w8a8", "w4a4+attn8": "w4a16"}  # decoding quantizes weights alone at 4 bits
_VAE = {"fp32": "fp32"}  # elsewhere in 16 bits: convolutions are not quantized


@dataclass(frozen=True, kw_only=True)
class Bound:
    """Seconds of one request on one device: floor and prediction by stage (the two halves of `language` joined)."""

    device: str
    scheme: str
    floor: Mapping[str, float]
    prediction: Mapping[str, float]

    @property
    def floor_total(self) -> float:
        return sum(self.floor.values())

    @property
    def prediction_total(self) -> float:
        return sum(self.prediction.values())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--device", action="append", help="a key of devices.toml; repeatable; default: all")
    parser.add_argument("--size", default="1024", metavar="WxH", help="pixels; one number for a square")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--new-tokens", type=int, default=300)
    parser.add_argument("--plot", type=Path, help="a PNG")


def run(options: argparse.Namespace) -> int:
    """Prints both tables."""
    sheet, config = load_devices(), published()
    width, height = parse_size(options.size)
    work = Workload(height=height, width=width, steps=options.steps, new_tokens=options.new_tokens)
    choices = [(device, scheme) for device in with_figures(options.device, sheet) for scheme in DEFAULT_SCHEMES]
    found = [b for d, s in choices if (b := bound(config, work, d, s, sheet.efficiency)) is not None]
    memory = {(d.name, s): memory_note(config, work, d, s) for d, s in choices}
    sys.stdout.write(f"published sizes, {describe(work)}\n\n{table(found, memory)}\n")
    rows = [(r, *m) for r in all_results() if (m := measured_bound(r, sheet)) is not None]
    if rows:
        sys.stdout.write(f"\n{measured_table(rows)}\n")
    if options.plot:
        title = f"published sizes, {width}x{height}, {options.steps} steps, {options.new_tokens} new tokens"
        plot(found, measured_totals(config, work, rows), options.plot, title)
    return 0


def kernel_seconds(op: Op, scheme: Scheme, tflops: Mapping[str, float | None], speed: float) -> float:
    """One kernel at a roofline: the longer of its operations at the peak of its kind and its bytes at `speed` GB/s."""
    peak = tflops.get("attention" if op.kind == "attention" else "gemm") if op.flops else None
    return max(op.flops / (peak * 1e12) if peak else 0.0, scheme.bytes(op) / (speed * 1e9)) * op.repeat


def stage_scheme(stage: str, scheme: str) -> Scheme:
    """The precisions of one stage under a named choice for the model."""
    if stage == "vae":
        return SCHEMES[_VAE.get(scheme, "bf16")]
    if stage in ("vision", "connector"):
        return SCHEMES[scheme if scheme in ("fp32", "bf16", "bf16-eager") else "bf16"]
    return SCHEMES[_DECODE.get(scheme, scheme) if stage.startswith("language") else scheme]


def bound(
    config: ModelConfig, work: Workload, device: Device, scheme: str, efficiency: Mapping[str, float]
) -> Bound | None:
    """Floor and prediction of a request; None where the device lacks the precision."""
    if device.best(SCHEMES[scheme].gemm) is None or device.best(SCHEMES[scheme].attention) is None:
        return None
    floor, prediction = dict.fromkeys(STAGES, 0.0), dict.fromkeys(STAGES, 0.0)
    for cost in request_costs(config, work, fused=SCHEMES[scheme].fused):
        stage = cost.name.split(".")[0]
        chosen = stage_scheme(cost.name, scheme)
        floor[stage] += _seconds(cost, chosen, _peaks(device, chosen, None), device.speed)
        prediction[stage] += _seconds(
            cost, chosen, _peaks(device, chosen, efficiency), device.speed * efficiency["memory"]
        )
    return Bound(device=device.name, scheme=scheme, floor=floor, prediction=prediction)


def _seconds(cost: StageCost, scheme: Scheme, tflops: Mapping[str, float | None], speed: float) -> float:
    return cost.units * sum(kernel_seconds(op, scheme, tflops, speed) for op in cost.ops)


def _peaks(device: Device, scheme: Scheme, efficiency: Mapping[str, float] | None) -> dict[str, float | None]:
    """TFLOP/s by kind of kernel; with efficiencies what software may reach, else the ceiling."""

    def peak(precisions: tuple[str, ...]) -> float | None:
        if efficiency is None:
            return device.best(precisions)
        bits = {"fp32": 16, "bf16": 16, "fp8": 8, "fp4": 4}[precisions[0]]
        return device.reached(precisions, efficiency[f"gemm{bits}"])

    return {"gemm": peak(scheme.gemm), "attention": peak(scheme.attention)}


def measured_bound(result: Result, sheet: Sheet) -> tuple[Bound, str] | None:
    """The floor of a measured run and what it rests on: the run's own measured ceilings, else the device sheet.

    None where neither is known. The cost model uses the result's own configuration and request.
    """
    scheme = {"float32": "fp32", "bfloat16": "bf16", "float16": "bf16"}.get(result.dtype)
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
    if device is None:
        return None
    found = bound(result.config, result.workload, device, scheme, sheet.efficiency)
    return (found, basis) if found else None


def table(bounds: Sequence[Bound], fits: Mapping[tuple[str, str], str]) -> str:
    """Markdown: one row a device and precision; every time that nobody measured says "prediction" in its heading."""
    head = "| device | precision | " + " | ".join(f"{s} floor (s)" for s in STAGES)
    head += " | total floor (s) | total prediction (s) | memory (plan) |"
    lines = [head, "|" + " --- |" * (len(STAGES) + 5)]
    for row in bounds:
        cells = [row.device, row.scheme, *(_seconds_text(row.floor[s]) for s in STAGES)]
        cells += [_seconds_text(row.floor_total), _seconds_text(row.prediction_total)]
        cells.append(fits.get((row.device, row.scheme), "-"))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def memory_note(config: ModelConfig, work: Workload, device: Device, scheme: str) -> str:
    """Whether a request fits the device: what its weights stay or are swapped at, by the planner. A prediction."""
    weights = _STORED[scheme]
    precision = Precision(language=weights[0], head=weights[1], decoder=weights[2], vae="bfloat16")
    try:
        found = plan(config, work, precision=precision, budget=device.bytes, reserve=device.reserve)
    except OutOfMemoryError:
        return "does not fit"
    return f"{gigabytes(found.peak)}, {'all loaded' if not found.moved else 'swaps ' + gigabytes(found.moved)}"


def measured_totals(config: ModelConfig, work: Workload, rows: Sequence[tuple[Result, Bound, str]]) -> list[Measured]:
    """(device, precision, seconds) of the results that measured exactly this request of this model."""
    same = [(r, b) for r, b, _ in rows if r.config == config and r.workload == work]
    return [(b.device, b.scheme, r.median("total")) for r, b in same]


def measured_table(rows: Sequence[tuple[Result, Bound, str]]) -> str:
    """Markdown: measured medians beside the floor of the same request, with the ratio for each stage and in all."""
    lines = [
        "| result | machine | stage | measured (s) | floor (s) | measured / floor | floor rests on |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for result, found, basis in rows:
        for stage in STAGES:
            seconds, floor = result.median(stage), found.floor[stage]
            if seconds and floor:
                lines.append(
                    f"| {result.path.name} | {result.machine} | {stage} | {seconds:.4g} | {floor:.4g} "
                    f"| {seconds / floor:.2f} | {basis} |"
                )
    return "\n".join(lines)


def _seconds_text(value: float) -> str:
    return "-" if value == 0 else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def plot(bounds: Sequence[Bound], measured: Sequence[Measured], path: Path, title: str) -> None:
    """A dot plot, seconds an image on a log axis: floor (open), prediction (filled), measured (star). PNG at path.

    measured: (device name, precision, seconds) of runs of the same request.
    """
    from ..figures import COLOURS, log_axis, new_figure, save

    devices = list(dict.fromkeys(b.device for b in bounds))
    schemes = list(dict.fromkeys(b.scheme for b in bounds))
    figure, axes = new_figure(9.0, 1.6 + 0.62 * len(devices))
    for b in bounds:
        at = len(devices) - 1 - devices.index(b.device) + 0.22 * (len(schemes) / 2 - 0.5 - schemes.index(b.scheme))
        colour = COLOURS[schemes.index(b.scheme) % len(COLOURS)]
        axes.plot([b.floor_total, b.prediction_total], [at, at], color=colour, lw=1.2, alpha=0.5, zorder=1)
        axes.plot(b.floor_total, at, "o", mfc="white", mec=colour, ms=7, zorder=2)
        axes.plot(b.prediction_total, at, "o", color=colour, ms=7, zorder=2)
        axes.annotate(
            _seconds_text(b.prediction_total), (b.prediction_total, at), (6, -3), textcoords="offset points", fontsize=7
        )
    for device, scheme, seconds in measured:
        if device in devices and scheme in schemes:
            at = len(devices) - 1 - devices.index(device) + 0.22 * (len(schemes) / 2 - 0.5 - schemes.index(scheme))
            axes.plot(seconds, at, "*", color="black", ms=12, zorder=3)
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


def describe(work: Workload) -> str:
    """One line that says which request the figures are for."""
    branches = " + ".join(f"{n} condition tokens" for n in work.branches)
    return (
        f"{work.width}x{work.height}, {work.steps} steps, {branches}, "
        f"{work.prompt_tokens} prompt and {work.new_tokens} thinking tokens"
    )
