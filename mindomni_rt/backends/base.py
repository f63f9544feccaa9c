"""What every backend offers: one method for each of the six stages.

Two stages are loops, `language` and `denoiser`: for them a backend offers a session, and the loops themselves are
`sampling.decode` and `sampling.denoise`.

`Array` is whatever a backend keeps its data in (a torch tensor, a numpy array, a device buffer). The pipeline passes
arrays from one stage to the next without looking inside, so nothing need leave the device between stages.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ..checkpoint.config import ModelConfig
from ..inputs.images import ImagePatches
from ..memory.layers import Workload
from ..sampling.schedule import Step

Array = Any
FIRST_STEPS = ("full", "condition_only")
OPTIONAL = {
    "draft_tokens": "leave it out",
    "step_cache": "leave it out",
    "first_step": "leave it out, or build the bundle with --first-step condition_only",
}
"""Options of a request that a backend may lack, beside their defaults, and what to do then."""
IN_FLIGHT = 2
"""Denoising steps that a device has yet to finish when one is reported: no more, so that progress is true and a
cancelled request ends soon."""
ADAPTERS = "adapters"
"""A capability: LoRA adapters are loaded and unloaded, by the backend's `adapters`."""
PROMPT_BATCHES = "prompt_batches"
"""A capability: images of several prompts are painted in one loop."""


@dataclass(frozen=True, kw_only=True)
class LanguageRequest:
    """A prompt and how to continue it. max_new_tokens 0 asks for the prompt's hidden states alone.

    token_ids (S,); positions (3, S) and next_position as `positions.mrope_positions` gives them; image_embeds from
    stage `vision`, in the order of the image tokens. temperature 0 is greedy; above it each token is sampled with its
    entry of `uniforms` (max_new_tokens,), so that every backend chooses alike. draft_tokens: guesses verified at once
    (`sampling.drafts`); the text is the same. Setting `cancel` ends the text with GenerationCancelled. paints: images
    are made of the text, so their weights may be brought while it is written.
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
    cancel: threading.Event | None = None
    paints: bool = False


class LanguageSession(Protocol):
    """A prompt that has been prefilled, and the text that grows behind it. `sampling.decode` drives it.

    room: how many tokens may follow, max_new_tokens or less where the cache ends before. lag: steps that may be queued
    before the first is read.
    """

    request: LanguageRequest
    room: int
    lag: int

    def advance(self, draft: Sequence[int] = ()) -> None:
        """Queues a step: the choice of the next token, and of one after each drafted token.

        The first step chooses from the prompt's scores and takes no draft. Each later one runs the last kept token and
        the draft through the model.
        """
        ...

    def read(self) -> list[int]:
        """Choices of the oldest step that was not read, one more than its draft. Waits for the device, once."""
        ...

    def keep(self, count: int) -> None:
        """How many of the choices just read belong to the text: the accepted drafts and the one after them."""
        ...

    def hidden(self, written: int = 0) -> Array:
        """Pre-norm hidden states (1, L, C) of the prompt and of the first `written` tokens but the last of them."""
        ...


class Prefix(Protocol):
    """K/V of one branch's condition and of the time tokens of all its steps."""

    @property
    def length(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class DenoiseRequest:
    """One denoising loop. latents (n, 4, h, w) float32 noise; times (steps + 1,) from 0 to 1.

    guided: one prefix for all latents, or one for each (with the capability PROMPT_BATCHES).

    unguided None runs the guided branch alone (guidance scale 1 needs no other). first_step "condition_only" gives
    the first step the condition's keys only, as the released code does with its cache on; "full" is the model as
    trained. guidance_interval, solver and step_cache are lossy (`schedule.within`, `schedule.Solver`,
    `fast.step_cache.StepCache`). Setting `cancel` ends the loop with GenerationCancelled.
    """

    latents: NDArray[np.float32]
    times: NDArray[np.float64]
    guided: Prefix | tuple[Prefix, ...]
    unguided: Prefix | None
    guidance_scale: float
    first_step: str = "full"
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    solver: str = "euler"
    step_cache: float = 0.0
    cancel: threading.Event | None = None

    def prefixes(self) -> list[Prefix]:
        """The guided prefix, then the unguided one if there is any; of one prompt."""
        assert not isinstance(self.guided, tuple), "a batch of prompts for a backend that paints one at a time"
        return [self.guided] if self.unguided is None else [self.guided, self.unguided]

    def branches(self) -> list[tuple[Prefix, ...]]:
        """The prefixes of each branch: one for all latents, or one for each."""
        guided = self.guided if isinstance(self.guided, tuple) else (self.guided,)
        return [guided] if self.unguided is None else [guided, (self.unguided,)]


class DenoiseSession(Protocol):
    """Latents on the device between the steps of a loop. `sampling.denoise` drives it; arrays are (n, 4, h, w)."""

    def step(self, step: Step) -> None:
        """Queues one step: velocities, guidance, update. Nothing is copied to the host."""
        ...

    def mark(self) -> Callable[[], None]:
        """A function that waits until what is queued so far has run."""
        ...

    @property
    def latents(self) -> Array:
        """The current latents, float32. The next step may reuse their memory; after the last one they stay."""
        ...

    @property
    def velocity(self) -> Array:
        """The last step's velocity after guidance."""
        ...

    def ahead(self, time: float) -> Array:
        """latents + time · velocity."""
        ...


class Backend(Protocol):
    """A loaded model. capabilities: those of `OPTIONAL` that it has, ADAPTERS, PROMPT_BATCHES."""

    name: str
    device: str
    dtype: str
    config: ModelConfig
    capabilities: frozenset[str]

    def vision(self, image: ImagePatches) -> Array:
        """Patches -> image embeddings (tokens, language hidden)."""
        ...

    def language(self, request: LanguageRequest) -> LanguageSession:
        """Prefills a prompt; the session gives hidden states and next tokens."""
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

    def denoiser(self, request: DenoiseRequest) -> DenoiseSession:
        """Noise and prefixes on the device, ready for the first step."""
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

    def finite(self, array: Array) -> bool:
        """Whether an array holds neither NaN nor infinity. Waits for the device."""
        ...

    def close(self) -> None:
        """Frees the model's memory; nothing can be called after it."""
        ...

    def synchronize(self) -> None:
        """Waits for the device; what a clock needs."""
        ...


@runtime_checkable
class Buffered(Protocol):
    """A backend whose buffers stay for the next request. Those of a larger one take room that a plan does not count."""

    def kept(self) -> dict[str, Workload]:
        """By stage, sizes of a request for which the buffers that are there would be made."""
        ...

    def release(self) -> None:
        """Frees them; between stages."""
        ...
