"""A page in the browser: generate, edit and ask, with the thinking as it is written and previews."""

from __future__ import annotations

import argparse

from mindomni_rt.errors import BadRequestError

from .. import model
from ..listening import listen


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, and where to listen."""
    model.add_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine alone)")
    parser.add_argument("--port", type=int, default=7860, help="0 takes a free one")
    parser.add_argument("--open", action="store_true", help="open the page in a browser")


def run(given: argparse.Namespace) -> int:
    """Serves the page until Ctrl-C. Raises MindOmniError."""
    if not 0 <= given.port <= 65535:
        raise BadRequestError(f"--port {given.port}: expected 0 to 65535")
    chosen = model.chosen(given)
    chosen.check()
    if given.port:
        listen(given.host, given.port).close()  # a port in use ends the command before the model is read
    from ..engine import Engine
    from .page import build, launch  # Gradio takes seconds to import

    pipe = chosen.load()
    engine = Engine(lambda: pipe)
    engine.start()
    try:
        launch(build(engine, chosen), host=given.host, port=given.port, inbrowser=given.open)
    finally:
        engine.stop()
        engine.join(timeout=10)
    return 0
