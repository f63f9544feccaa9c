"""The commands of this package: `mindomni serve`, `mindomni ui`, `mindomni batch`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mindomni_rt.commands import run_package

_COMMANDS = {
    "serve": ("mindomni_rt.serving.server", "an HTTP server in OpenAI's form"),
    "ui": ("mindomni_rt.serving.ui.command", "a page in the browser on which to try a model"),
    "batch": ("mindomni_rt.serving.batch", "a file of prompts to a folder of pictures, on one device or many"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, 1 where a part of a batch failed, 2 for a mistake in what was asked, 130 when interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    extra = given[0] if given[:1] in (["serve"], ["ui"]) else "onnx"  # what a batch runs on
    return run_package(given, "mindomni", __doc__, _COMMANDS, extra=extra)
