"""What every backend offers: one method for each of the six stages.

`Array` is whatever a backend keeps its data in (a torch tensor, a numpy array, a device buffer). The pipeline passes
arrays from one stage to the next without looking inside, so nothing need leave the device between stages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..checkpoint.config import ModelConfig
from ..inputs.images import ImagePatches

Array = Any
FIRST_STEPS = ("full", "condition_only")


def never() -> bool:
    """The default of every `cancelled` argument."""
    return False


@dataclass(frozen=True, kw_only=True)
class LanguageRequest:
    """A prompt and how to continue it. max_new_tokens 0 asks for the prompt's hidden states alone.

    token_ids (S,); positions (3, S) and next_position as `positions.mrope_positions` gives them; image_embeds from
    stage `vision`, in the order of the image tokens. temperature 0 is greedy; above it each token is drawn with its
    entry of `uniforms` (max_new_tokens,), so that every backend draws alike. draft_tokens: guesses verified at once
    (`speculative`), where the backend can; the text is the same.
    """

    token_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    next_position: int
    image_embeds: Array | None = None
    max_new_tokens: int = 0
    eos_token_ids: Sequence[int] = ()
    repetition_penalty: float = 1.0
    temperature: float = 0.0
    uniforms: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    draft_tokens: int = 0
    cancelled: Callable[[], bool] = never


class LanguageRun(Protocol):
    """Iterate for token ids as they are chosen (the end-of-text token too); then read `hidden`."""

    def __iter__(self) -> Iterator[int]: ...

    @property
    def hidden(self) -> Array:
        """Pre-norm hidden states (1, L, C) of the prompt and of every generated token but the last chosen."""
        ...


class Prefix(Protocol):
    """K/V of one branch's condition and of the time tokens of all its steps."""

    @property
    def length(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class DenoiseRequest:
    """One denoising loop. latents (n, 4, h, w) float32 noise; times (steps + 1,) from 0 to 1.

    unguided None runs the guided branch alone (guidance scale 1 needs no other). first_step "condition_only" gives
    the first step the condition's keys only, as the released code does with its cache on; "full" is the model as
    trained. guidance_interval, solver and step_cache are lossy (`schedule.within`, `schedule.Solver`,
    `torch_cache.StepCache`); a backend names those it can in `features`.
    """

    latents: NDArray[np.float32]
    times: NDArray[np.float64]
    guided: Prefix
    unguided: Prefix | None
    guidance_scale: float
    first_step: str = "full"
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    solver: str = "euler"
    step_cache: float = 0.0
    cancelled: Callable[[], bool] = never


class Backend(Protocol):
    """A loaded model."""

    name: str
    device: str
    dtype: str
    config: ModelConfig

    def vision(self, image: ImagePatches) -> Array:
        """Patches -> image embeddings (tokens, language hidden)."""
        ...

    def language(self, request: LanguageRequest) -> LanguageRun:
        """Tokens -> next tokens and hidden states."""
        ...

    def connector(self, hidden: Array, image_latents: Sequence[tuple[int, Array]] = ()) -> Array:
        """Hidden states (1, L, C) -> condition (1, L, decoder hidden).

        image_latents: (start, latents (1, 4, h, w)) of reference images, whose tokens replace the outputs there.
        """
        ...

    def prefix(
        self,
        condition: Array,
        times: NDArray[np.float64],
        image_tokens: int,
        blocks: Sequence[tuple[int, int]] = (),
    ) -> Prefix:
        """Condition and the schedule's times (T,) -> K/V. image_tokens decides LongRoPE's factors."""
        ...

    def denoiser(self, request: DenoiseRequest) -> Iterator[tuple[Array, Array]]:
        """After each step: (latents, guided velocity), each (n, 4, h, w). The next step may reuse their memory."""
        ...

    def vae(self, latents: Array) -> NDArray[np.float32]:
        """Latents (n, 4, h, w) -> pixels (n, 8h, 8w, 3) in [0, 1]."""
        ...

    def vae_encode(self, pixels: NDArray[np.float32]) -> Array:
        """Pixels (1, 3, H, W) in [-1, 1] -> latents (1, 4, H/8, W/8), scaled as the decoder expects them."""
        ...

    def numpy(self, array: Array) -> NDArray[np.float32]:
        """A host copy, float32."""
        ...

    def synchronize(self) -> None:
        """Waits for the device; what a clock needs."""
        ...
