"""ComfyUI's progress bar: `shown` collects (node, step, total, preview), `on_update` is called with each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import model_management

shown: list[tuple[Any, int, int, Any]] = []
on_update: list[Callable[[int], None]] = []


class ProgressBar:
    def __init__(self, total: int, node_id: Any = None) -> None:
        self.total, self.node_id = total, node_id

    def update_absolute(self, value: int, total: int | None = None, preview: Any = None) -> None:
        model_management.throw_exception_if_processing_interrupted()  # as ComfyUI's own hook does
        shown.append((self.node_id, value, total or self.total, preview))
        for call in on_update:
            call(value)
