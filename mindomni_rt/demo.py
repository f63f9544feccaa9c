"""The small trained model that comes with the package."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .errors import BadCheckpointError

logger = logging.getLogger(__name__)
# A wheel carries both forms inside the package; a checkout has them beside it. The bundle needs no torch.
_INSTALLED = Path(__file__).with_name("assets")
_ASSETS = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).parents[1] / "assets"
DEMO_MODELS = ((_ASSETS / "shapes-world-bundle", "onnxruntime"), (_ASSETS / "shapes-world", "torch"))
DEMO_NAME = "demo"
DEMO_PROMPT = "draw (1 + 2) things of the colour of a lemon, shaped like a wheel"
DEMO_SETTINGS: dict[str, Any] = dict(max_new_tokens=48)  # its thoughts are short; the rest is its own


def runnable_demo() -> Path | None:
    """The small model in the form that the installed packages can run."""
    found = (folder for folder, package in DEMO_MODELS if folder.is_dir() and find_spec(package) is not None)
    return next(found, None)


def demo_folder() -> Path:
    """The same; where a package is missing, the first form: loading it names the package. Raises BadCheckpointError."""
    found = runnable_demo() or next((folder for folder, _ in DEMO_MODELS if folder.is_dir()), None)
    if found is not None:
        return found
    raise BadCheckpointError("this installation has no small model; give a folder or a hub id")


def demo_checkpoint() -> Path:
    """The small model as a checkpoint: what training, export and the torch backend read. Raises BadCheckpointError."""
    folder = DEMO_MODELS[-1][0] if DEMO_MODELS else None
    if folder is not None and folder.is_dir():
        return folder
    raise BadCheckpointError("this installation has no small model; give a folder or a hub id")


def tell_small(folder: Path) -> None:
    """One line of the log: a stranger expects more words of a model than this one has."""
    logger.warning("model demo (%s): the small model of the package, which knows only 117 words", folder.name)
