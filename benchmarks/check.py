"""`python -m benchmarks check RESULT.json`: whether a result file is complete, before you send it to anyone."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .results import read_json
from .schema import problems


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("result", type=Path, help="a .json file that a benchmark wrote")


def run(options: argparse.Namespace) -> int:
    """Prints what is wrong, one line each; 1 if anything is."""
    found = problems(read_json(options.result))
    sys.stdout.write("".join(f"{line}\n" for line in found) or f"{options.result}: a complete result\n")
    return int(bool(found))
