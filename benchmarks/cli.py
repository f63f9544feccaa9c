"""`python -m benchmarks COMMAND`: how fast, will it fit, how good."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any

from mindomni_rt.commands import Parser, front_door

_COMMANDS = {
    "latency": (".latency.command", "one request, stage by stage, on this machine"),
    "compare": (".compare", "two results of one kind, latency or counts; exit code 1 where the second is worse"),
    "check": (".check", "whether a result file is complete; exit code 1 where it is not"),
    "peers": (".peers.command", "transformers, diffusers and onnxruntime beside ours, on the same weights"),
    "counts": (".counts.command", "operations, operators, bytes and graph nodes of a fixed request: no clock"),
    "quality": (".quality.command", "images in the formats of official evaluators"),
    "lossy": (".quality.lossy", "what each lossy option costs"),
    "roofline": (".roofline.command", "floors and predictions by device and precision"),
    "load": (".load.command", "a server under many clients, each answer checked"),
    "plan": (".plan", "what stays loaded within a memory budget"),
    "gpu": (".gpu.suite", "correctness, speed, memory and baselines on one GPU, within some minutes"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, 1 for a regression, 2 for a mistake in what was asked, 130 when interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return front_door(lambda: _run(given))
    except SystemExit as end:  # of argparse: 0 after --help, 2 for a mistake
        return int(end.code or 0)


def _run(given: Sequence[str]) -> int:
    parser = Parser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, text) in _COMMANDS.items():
        if given[:1] != [name]:
            commands.add_parser(name, help=text)
            continue
        found = importlib.import_module(module, __package__)  # its imports only when it is asked for
        form: Any = argparse.RawDescriptionHelpFormatter
        found.add_arguments(commands.add_parser(name, help=text, description=found.__doc__, formatter_class=form))
    options = parser.parse_args(given)
    return int(importlib.import_module(_COMMANDS[options.command][0], __package__).run(options))
