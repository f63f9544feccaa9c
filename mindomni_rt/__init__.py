"""MindOmni: think, then paint. `load` a model, then `generate`, `understand` or `stream`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import (
    BadBundleError,
    BadCheckpointError,
    BadRequestError,
    MindOmniError,
    MissingExtraError,
    OutOfMemoryError,
    UnsupportedDeviceError,
)
from .loading import load

if TYPE_CHECKING:
    from .events import AnswerEvent, Event, GenerationResult, ImageEvent, StepEvent, TextEvent
    from .pipeline import GenerationCancelled, Pipeline

# In a checkout without symbolic links (Windows), the linked folders are found beside this one.
if not Path(__file__).with_name("kernels").is_dir():
    __path__.append(str(Path(__file__).parents[1]))

__version__ = "0.2.0"
__all__ = [
    "AnswerEvent",
    "BadBundleError",
    "BadCheckpointError",
    "BadRequestError",
    "Event",
    "GenerationCancelled",
    "GenerationResult",
    "ImageEvent",
    "MindOmniError",
    "MissingExtraError",
    "OutOfMemoryError",
    "Pipeline",
    "StepEvent",
    "TextEvent",
    "UnsupportedDeviceError",
    "from_pretrained",
    "load",
]
from_pretrained = load  # the name that users of diffusers and transformers look for
_LAZY = {"Pipeline": "pipeline", "GenerationCancelled": "pipeline"}


def __getattr__(name: str) -> Any:
    """The rest of the public names, imported when first used: importing this package stays fast."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_LAZY.get(name, 'events')}", __name__), name)
