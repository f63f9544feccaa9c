"""MindOmni: think, then paint. `load` a model, then `generate`, `understand` or `stream`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import (
    BadBundleError,
    BadCheckpointError,
    BadRequestError,
    GenerationCancelled,
    MindOmniError,
    MissingExtraError,
    NotFiniteError,
    OutOfMemoryError,
    UnsupportedDeviceError,
)
from .loading import load

if TYPE_CHECKING:
    from .asynchronous import AsyncPipeline
    from .checks import UNSET
    from .events import AnswerEvent, Event, GenerationResult, ImageEvent, Round, StepEvent, TextEvent
    from .inputs.saving import read_settings, save_image
    from .pipeline import Pipeline
    from .request import Request, UnderstandRequest

# onnxruntime writes an identifier and a database of events into the user's cache when it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
# In a checkout without symbolic links (Windows), the linked folders are found beside this one.
if not Path(__file__).with_name("kernels").is_dir():
    __path__.append(str(Path(__file__).parents[1]))

__version__ = "0.2.0"
__all__ = [
    "UNSET",
    "AnswerEvent",
    "AsyncPipeline",
    "BadBundleError",
    "BadCheckpointError",
    "BadRequestError",
    "Event",
    "GenerationCancelled",
    "GenerationResult",
    "ImageEvent",
    "MindOmniError",
    "MissingExtraError",
    "NotFiniteError",
    "OutOfMemoryError",
    "Pipeline",
    "Request",
    "Round",
    "StepEvent",
    "TextEvent",
    "UnderstandRequest",
    "UnsupportedDeviceError",
    "from_pretrained",
    "load",
    "read_settings",
    "save_image",
]
from_pretrained = load  # the name that users of diffusers and transformers look for
_LAZY = {
    "AsyncPipeline": "asynchronous",
    "Pipeline": "pipeline",
    "Request": "request",
    "UNSET": "checks",
    "UnderstandRequest": "request",
    "read_settings": "inputs.saving",
    "save_image": "inputs.saving",
}


def __getattr__(name: str) -> Any:
    """The rest of the public names, imported when first used: importing this package stays fast."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_LAZY.get(name, 'events')}", __name__), name)
