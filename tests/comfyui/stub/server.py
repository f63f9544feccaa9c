"""ComfyUI's connection to the browser: `texts` collects what nodes show below their widgets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

texts: list[tuple[Any, str]] = []
on_text: list[Callable[[str], None]] = []


class PromptServer:
    instance: PromptServer

    def send_progress_text(self, text: str, node_id: Any, sid: Any = None) -> None:
        texts.append((node_id, text))
        for call in on_text:
            call(text)


PromptServer.instance = PromptServer()
