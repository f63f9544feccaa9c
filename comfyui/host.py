"""What a node needs of ComfyUI: pictures in its form, its progress bar, its stop button."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from typing import Any, TypeVar

import numpy as np
import torch
from comfy import model_management
from comfy.utils import ProgressBar
from numpy.typing import NDArray
from server import PromptServer

from mindomni_rt import GenerationCancelled, GenerationResult, StepEvent, TextEvent

R = TypeVar("R")
_PREVIEW_SIDE = 512  # ComfyUI reduces larger previews


class StopButton:
    """The `cancel` of a request: set while ComfyUI's user wants to stop."""

    def is_set(self) -> bool:
        """Looked at before each token and each step."""
        return bool(model_management.processing_interrupted())


def follow(events: Generator[Any, None, R], node_id: str, total: int) -> R:
    """Runs a request and returns what its generator returns; None for `Pipeline.stream`, see `result_of`.

    Steps move the bar of the node, of `total` where no step has come yet; text appears below it as it is written.
    Stopping raises ComfyUI's own exception, after the request has ended.
    """
    bar, text, kind = ProgressBar(total, node_id), "", ""
    try:
        with closing(events):
            while True:
                event = next(events)
                if isinstance(event, TextEvent):
                    text, kind = text + ("\n" if kind not in ("", event.kind) else "") + event.text, event.kind
                    show_text(text, node_id)
                elif isinstance(event, StepEvent):
                    preview = ("JPEG", event.preview[0], _PREVIEW_SIDE) if event.preview else None
                    bar.update_absolute(event.step, event.total, preview)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
    except GenerationCancelled:
        model_management.throw_exception_if_processing_interrupted()
        raise


def result_of(events: Generator[Any, None, None], node_id: str, total: int) -> GenerationResult:
    """`follow` for a whole request: its result."""

    def returned() -> Generator[Any, None, GenerationResult]:
        with closing(events):
            for event in events:
                yield event
        return event.result  # type: ignore[no-any-return]

    return follow(returned(), node_id, total)


def show_text(text: str, node_id: str) -> None:
    """Text below the widgets of a node."""
    PromptServer.instance.send_progress_text(text.strip(), node_id)


def to_tensor(pixels: NDArray[np.float32]) -> torch.Tensor:
    """Pixels (n, H, W, 3) in [0, 1] as an IMAGE: float32 (B, H, W, C)."""
    return torch.from_numpy(np.ascontiguousarray(pixels))


def pictures(image: torch.Tensor | None) -> list[NDArray[np.uint8] | None]:
    """An IMAGE (B, H, W, C) as arrays (H, W, C); [None] without one."""
    if image is None:
        return [None]
    rows = (image.detach().cpu().float().clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    return [row[..., 0] if row.shape[-1] == 1 else row for row in rows]


def free_memory() -> None:
    """ComfyUI's own models leave the device, so that the memory counted as free is there to use."""
    model_management.unload_all_models()
    model_management.soft_empty_cache()
