"""A request to generate: its defaults, written once, and its checks."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .backends.base import FIRST_STEPS, OPTIONAL
from .errors import BadRequestError
from .inputs.images import DEFAULT_IMAGE_TOKENS
from .inputs.prompts import DEFAULT_NEGATIVE
from .sampling.schedule import SOLVERS

MAX_SIDE = 3072
MAX_STEPS = 1000


@dataclass(frozen=True, kw_only=True)
class Request:
    """Arguments of `Pipeline.generate`, checked. Sizes in pixels; see there for each one's meaning."""

    prompt: str
    image: Any = None
    think: bool = True
    cascade: bool = False
    height: int = 1024
    width: int = 1024
    num_inference_steps: int = 50
    guidance_scale: float = 3.0
    negative_prompt: str = DEFAULT_NEGATIVE
    seed: int | None = None
    latents: NDArray[np.float32] | None = None
    max_new_tokens: int = 512
    temperature: float = 0.0
    first_step: str = "full"
    edit_features: str | None = None
    num_images: int = 1
    max_image_tokens: int | None = DEFAULT_IMAGE_TOKENS
    preview_every: int = 0
    output: str = "pil"
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    solver: str = "euler"
    step_cache: float = 0.0
    draft_tokens: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise BadRequestError("the prompt is empty; say what to paint")
        for name in ("height", "width"):
            side = getattr(self, name)
            if not isinstance(side, int) or side % 16 or not 16 <= side <= MAX_SIDE:
                raise BadRequestError(f"{name} = {side}: expected a multiple of 16 from 16 to {MAX_SIDE} pixels")
        for name in ("num_inference_steps", "num_images", "max_new_tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise BadRequestError(f"{name} = {value}: expected a whole number of at least 1")
        if self.num_inference_steps > MAX_STEPS:
            raise BadRequestError(
                f"num_inference_steps = {self.num_inference_steps}: expected at most {MAX_STEPS}; the time tokens of "
                "all steps are computed in one pass"
            )
        for name in ("guidance_scale", "temperature"):
            if not math.isfinite(getattr(self, name)) or getattr(self, name) < 0:
                raise BadRequestError(f"{name} = {getattr(self, name)}: expected a finite number of at least 0")
        for name, allowed in (
            ("first_step", FIRST_STEPS),
            ("edit_features", (None, "vit", "vit+vae")),
            ("output", ("pil", "numpy")),
            ("solver", SOLVERS),
        ):
            if getattr(self, name) not in allowed:
                raise BadRequestError(f"{name} = {getattr(self, name)!r}: expected one of {allowed}")
        if self.cascade and not self.think:
            raise BadRequestError("cascade thinking needs think=True")
        if self.preview_every < 0:
            raise BadRequestError(f"preview_every = {self.preview_every}: expected 0 (none) or a number of steps")
        start, end = self.guidance_interval if len(self.guidance_interval) == 2 else (1, 0)
        if not 0 <= start < end <= 1:
            raise BadRequestError(f"guidance_interval = {self.guidance_interval}: expected (start, end) within 0 to 1")
        if not (math.isfinite(self.step_cache) and self.step_cache >= 0):
            raise BadRequestError(f"step_cache = {self.step_cache}: expected 0 (off) or a small positive threshold")
        if not 0 <= self.draft_tokens <= 16:
            raise BadRequestError(f"draft_tokens = {self.draft_tokens}: expected 0 (off) to 16")
        if self.seed is not None and not isinstance(self.seed, int):
            raise BadRequestError(f"seed = {self.seed!r}: expected a whole number")
        if self.latents is not None and np.shape(self.latents) != self.latent_shape:
            raise BadRequestError(f"latents of shape {np.shape(self.latents)}: expected {self.latent_shape} float32")

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(n, 4, H/8, W/8)."""
        return self.num_images, 4, self.height // 8, self.width // 8

    def optional(self) -> list[str]:
        """Options in use that a backend may lack."""
        defaults = {f.name: f.default for f in fields(self)}
        return [name for name in OPTIONAL if getattr(self, name) != defaults[name]]

    def settings(self) -> dict[str, Any]:
        """What repeats the request, as plain data: everything but images and latents."""
        return {k: v for k, v in asdict(self).items() if k not in ("image", "latents", "output", "preview_every")}
