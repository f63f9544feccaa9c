"""`python -m benchmarks COMMAND`: how fast, will it fit, how good."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mindomni_rt.errors import MindOmniError

_MODULES = {
    "latency": "one request, stage by stage, on this machine",
    "compare": "two results of one kind, latency or counts; exit code 1 where the second is worse",
    "peers": "transformers, diffusers and onnxruntime beside ours, on the same weights",
    "counts": "operations, operators, bytes and graph nodes of a fixed request, the same on every machine",
    "quality": "images and answers in the formats of official evaluators",
}


def _module(command: str) -> Any:
    return importlib.import_module(".compare" if command == "compare" else f".{command}.command", __package__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, 1 for a regression, 2 for a mistake in what was asked, 130 when interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["gpu"]:
        return int(importlib.import_module(".gpu.suite", __package__).main(given[1:]))
    if given[:1] == ["lossy"]:
        return int(importlib.import_module(".quality.lossy", __package__).main(given[1:]))
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in _MODULES.items():
        command = commands.add_parser(name, help=text)
        if given[:1] == [name]:  # its imports only when it is asked for
            _module(name).add_arguments(command)
    roofline = commands.add_parser("roofline", help="floors and predictions by device and precision")
    roofline.add_argument("--device", action="append", help="RTX 4090, orin, …; repeatable; default: all with figures")
    roofline.add_argument("--size", type=int, default=1024)
    roofline.add_argument("--steps", type=int, default=50)
    roofline.add_argument("--new-tokens", type=int, default=300)
    roofline.add_argument("--plot", type=Path, help="a PNG")
    plan = commands.add_parser("plan", help="what stays loaded within a memory budget")
    plan.add_argument("--memory-budget", required=True, metavar="SIZE")
    plan.add_argument("--size", type=int, default=1024)
    commands.add_parser("gpu", help="the GPU suite", add_help=False)
    commands.add_parser("lossy", help="what each lossy option costs", add_help=False)
    options = parser.parse_args(given)
    try:
        if options.command == "roofline":
            return _roofline(options)
        if options.command == "plan":
            return _plan(options)
        return int(_module(options.command).run(options))
    except MindOmniError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130


def _roofline(options: argparse.Namespace) -> int:
    from mindomni_rt.checkpoint.config import published
    from mindomni_rt.devices.table import load_devices, with_figures
    from mindomni_rt.memory.layers import Workload

    from .results import all_results
    from .roofline.command import DEFAULT_SCHEMES, bound, describe, measured_bound, measured_table, plot, table
    from .roofline.command import measured_totals as totals
    from .roofline.command import memory_note as note

    sheet = load_devices()
    work = Workload(height=options.size, width=options.size, steps=options.steps, new_tokens=options.new_tokens)
    config = published()
    devices = with_figures(options.device, sheet)
    found = [
        b
        for device in devices
        for scheme in DEFAULT_SCHEMES
        if (b := bound(config, work, device, scheme, sheet.efficiency)) is not None
    ]
    memory = {(d.name, s): note(config, work, d, s) for d in devices for s in DEFAULT_SCHEMES}
    print(f"published sizes, {describe(work)}\n")
    print(table(found, memory))
    rows = [(r, *m) for r in all_results() if (m := measured_bound(r, sheet)) is not None]
    if rows:
        print("\n" + measured_table(rows))
    if options.plot:
        title = (
            f"published sizes, {options.size}x{options.size}, {options.steps} steps, {options.new_tokens} new tokens"
        )
        plot(found, totals(config, work, rows), options.plot, title)
    return 0


def _plan(options: argparse.Namespace) -> int:
    from mindomni_rt.checkpoint.config import published
    from mindomni_rt.memory.layers import Workload
    from mindomni_rt.memory.planner import gigabytes, parse_bytes, plan

    work = Workload(height=options.size, width=options.size)
    found = plan(published(), work, budget=parse_bytes(options.memory_budget))
    print(f"published sizes, {options.size}x{options.size}; predictions\n{found.summary()}")
    print(f"stays loaded: {', '.join(found.resident) or 'nothing'}")
    for move in found.schedule:
        loads = f" load {', '.join(move.load)}" if move.load else ""
        drops = f" drop {', '.join(move.drop)}" if move.drop else ""
        print(f"{move.stage:10} peak {gigabytes(move.peak):>9}{drops}{loads}")
    return 0
