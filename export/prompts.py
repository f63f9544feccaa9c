"""Prompts that a build calibrates 8-bit activations on."""

from __future__ import annotations

from pathlib import Path

from mindomni_rt.errors import BadRequestError
from mindomni_rt.files import read_text, why

DEFAULT_PROMPTS = (
    "a red bicycle leaning against a yellow wall in the rain",
    "the animal that gives us wool, asleep on a green hill, oil painting",
    "(3 + 4) paper boats on a still lake at dawn",
    "what a chemist would draw for water, as a neon sign",
)


def read_prompts(path: Path) -> list[str]:
    """One prompt a line. Raises BadRequestError if there is none."""
    try:
        lines = [line.strip() for line in read_text(path).splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise BadRequestError(f"calibration prompts {path}: {why(error)}") from error
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise BadRequestError(f"calibration prompts {path}: no prompt in it; expected one a line")
    return prompts
