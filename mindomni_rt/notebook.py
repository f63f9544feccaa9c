"""Texts and pictures as HTML, as notebooks show a result."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape

from PIL.Image import Image

from .inputs.saving import png_bytes


def as_html(texts: Iterable[tuple[str, str]], pictures: Sequence[Image], facts: Sequence[str]) -> str:
    """Named texts, pictures, and a last line of facts. Text is escaped: a model may write anything."""
    lines = [f"<p><b>{escape(name)}</b> {escape(text.strip())}</p>" for name, text in texts if text.strip()]
    for picture in pictures:
        data = base64.b64encode(png_bytes(picture)).decode("ascii")
        lines.append(f'<img src="data:image/png;base64,{data}" width="{picture.width}" height="{picture.height}">')
    lines += [f"<p><small>{escape(', '.join(facts))}</small></p>"] if facts else []
    return "\n".join(lines)
