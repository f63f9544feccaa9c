"""What to build."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .engines import Progress
from .prompts import DEFAULT_PROMPTS
from .targets import Choice, Target


@dataclass(frozen=True, kw_only=True)
class BuildRequest:
    """What to build. prompts: for calibration, at `calibration_size` pixels. condition_only: also the engine of that
    first step, which doubles the denoiser on disk (ONNX graphs share their weights, so there it is always built).
    attention: "native" is the runtime's own; "triton" puts our kernel into engines of `tensorrt`, while onnxruntime and
    TensorRT-RTX run what it means in standard operators. cache: as in `export.cache`; None keeps nothing.
    progress: of each engine; say: receives a line after each graph."""

    checkpoint: Path
    out: Path
    target: Target
    choice: Choice
    profile: str = "1024"
    condition_only: bool = False
    attention: str = "native"
    prompts: Sequence[str] = DEFAULT_PROMPTS
    calibration_size: int | None = None
    cache: Path | None = None
    overwrite: bool = False
    progress: Progress | None = field(default=None, compare=False)
    say: Callable[[str], None] | None = field(default=None, compare=False)
