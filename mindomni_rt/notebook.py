"""A result as HTML, as notebooks show it."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from .inputs.saving import png_bytes

if TYPE_CHECKING:
    from PIL.Image import Image

    from .events import GenerationResult


def result_html(result: GenerationResult, pictures: Sequence[Image]) -> str:
    """Thinking and answer of each round, the images, seed and seconds. Text is escaped: a model may write anything."""
    lines = []
    for written in result.rounds:
        for name, text in (("thinking", written.thinking), ("answer", written.answer or written.text)):
            if text.strip():
                lines.append(f"<p><b>{name}</b> {escape(text.strip())}</p>")
    for picture in pictures:
        data = base64.b64encode(png_bytes(picture)).decode("ascii")
        lines.append(f'<img src="data:image/png;base64,{data}" width="{picture.width}" height="{picture.height}">')
    facts = [] if result.seed is None else [f"seed {result.seed}"]
    if "total" in result.timings:
        facts.append(f"{result.timings['total']:.1f} s")
    if facts:
        lines.append(f"<p><small>{', '.join(facts)}</small></p>")
    return "\n".join(lines)
