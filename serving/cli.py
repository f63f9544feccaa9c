"""The commands of this package: `mindomni serve`, `mindomni batch`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any

from mindomni_rt.commands import Parser, front_door

_COMMANDS = {
    "serve": (".server", "an HTTP server in OpenAI's form"),
    "ui": (".ui.command", "a page in the browser on which to try a model"),
    "batch": (".batch", "a file of prompts to a folder of pictures, on one device or many"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, 1 where a part of a batch failed, 2 for a mistake in what was asked, 130 when interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return front_door(lambda: _run(given))
    except SystemExit as end:  # of argparse: 0 after --help, 2 for a mistake
        return int(end.code or 0)


def _run(given: Sequence[str]) -> int:
    parser = Parser(prog="mindomni", description=__doc__)
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
