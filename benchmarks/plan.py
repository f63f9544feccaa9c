"""`mindomni bench plan --memory-budget 8GiB`: what `load(memory_budget=…)` would keep loaded on a GPU.

The planner, the bytes of each stage and the reserve for the system are those of `export plan`. Two choices differ, and
`--precision` sets the first: without one this takes the most exact precision that fits, as loading does, where
`export plan` takes the target's table; and an engine's KV cache has a fixed capacity. The prompt has 256 tokens.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

from mindomni_rt.checkpoint.config import published
from mindomni_rt.devices.table import RESERVE
from mindomni_rt.memory.layers import BUDGETED
from mindomni_rt.memory.planner import gigabytes, parse_bytes, plan
from mindomni_rt.memory.precision import parse_precision
from mindomni_rt.options import parse_size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--memory-budget", required=True, metavar="SIZE", help="such as 8GiB: all of the device's")
    parser.add_argument("--precision", help="fp8, int8, int4, or pairs such as decoder=fp8,language=int4")
    parser.add_argument("--unified", action="store_true", help="memory that the CPU shares, as on Jetson")
    parser.add_argument("--size", default="1024", metavar="WxH", help="pixels; one number for a square")


def run(options: argparse.Namespace) -> int:
    """Prints the plan."""
    width, height = parse_size(options.size)
    work = replace(BUDGETED, height=height, width=width)
    precision = parse_precision(options.precision, "bfloat16", "bfloat16") if options.precision else None
    budget, reserve = parse_bytes(options.memory_budget), RESERVE[options.unified]
    found = plan(published(), work, precision=precision, budget=budget, reserve=reserve)
    lines = [
        f"published sizes, {width}x{height}; predictions",
        found.summary(),
        f"{gigabytes(reserve)} of it for the system, CUDA and libraries",
        f"stays loaded: {', '.join(found.resident) or 'nothing'}",
    ]
    for move in found.schedule:
        moved = [f" {verb} {', '.join(parts)}" for verb, parts in (("drop", move.drop), ("load", move.load)) if parts]
        lines.append(f"{move.stage:10} peak {gigabytes(move.peak):>9}{''.join(moved)}")
    sys.stdout.write("\n".join(lines) + "\n")
    return 0
