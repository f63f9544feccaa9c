"""An HTTP server in OpenAI's form."""

from __future__ import annotations

import argparse

from mindomni_rt.errors import BadRequestError

from . import model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    model.add_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Runs it. Raises MindOmniError."""
    raise BadRequestError(f"{model.chosen(options).path}: this command is not there yet")
