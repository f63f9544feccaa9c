"""The small trained model that comes with the package, and the settings that it was trained for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# A wheel carries the bundle inside the package; a checkout has both models beside it. The bundle needs no torch.
_INSTALLED = Path(__file__).with_name("assets")
_ASSETS = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).parents[1] / "assets"
DEMO_MODELS = ((_ASSETS / "shapes-world-bundle", "onnxruntime"), (_ASSETS / "shapes-world", "torch"))
# It draws 96x96 pixels and was trained to need no guidance.
DEMO_SETTINGS: dict[str, Any] = dict(height=96, width=96, num_inference_steps=20, guidance_scale=1.0, max_new_tokens=48)
