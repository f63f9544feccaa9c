"""The small trained model that comes with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# A wheel carries the bundle inside the package; a checkout has both models beside it. The bundle needs no torch.
_INSTALLED = Path(__file__).with_name("assets")
_ASSETS = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).parents[1] / "assets"
DEMO_MODELS = ((_ASSETS / "shapes-world-bundle", "onnxruntime"), (_ASSETS / "shapes-world", "torch"))
DEMO_SETTINGS: dict[str, Any] = dict(max_new_tokens=48)  # its thoughts are short; the rest is its own
