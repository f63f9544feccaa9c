"""The six stages of a request on any backend, one after another, each within a probe: a clock, a counter, peak memory.

The only module of this package that calls a backend's stages. Inputs are fixed: every backend and run gets the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mindomni_rt.backends.base import DenoiseRequest, LanguageRequest, Prefix
from mindomni_rt.backends.fast.backend import FastOptions, TorchCudaBackend
from mindomni_rt.backends.torch.device import is_cuda
from mindomni_rt.checkpoint.config import ModelConfig
from mindomni_rt.inputs.images import ImagePatches
from mindomni_rt.memory.layers import Workload
from mindomni_rt.memory.planner import Plan
from mindomni_rt.memory.precision import Precision
from mindomni_rt.model.mindomni import MindOmniModel
from mindomni_rt.sampling.decode import generate_tokens
from mindomni_rt.sampling.denoise import DenoiseState, denoise
from mindomni_rt.sampling.schedule import guide, timesteps

Frame = Callable[[str], AbstractContextManager[Any]]
"""What is entered around a stage, by its name: vision, language.prefill, language.decode, language.negative,
connector, prefix, denoiser, vae. Connector and prefix run once for each branch within one frame."""
GUIDANCE = 3.0


def noise(config: ModelConfig, work: Workload) -> NDArray[np.float32]:
    """Latents (images, C, h, w) to begin with."""
    shape = (work.images, config.decoder.latent_channels, work.height // 8, work.width // 8)
    return np.random.default_rng(2).standard_normal(shape, np.float32)


def mean_velocity(velocities: Tensor) -> Tensor:
    """Of the velocities (2, C, h, w) of both branches: what a guided step at scale 0.5 computes."""
    guided, unguided = velocities.float().split(1)
    return guide(guided, unguided, 0.5)


@dataclass(frozen=True)
class Stages:
    """One request of given sizes on a backend."""

    backend: Any
    work: Workload

    @cached_property
    def times(self) -> NDArray[np.float64]:
        """Of the whole loop, steps + 1."""
        return timesteps(self.work.steps)

    def text(self, count: int) -> NDArray[np.int64]:
        """Random token ids (count,), no image token among them."""
        language = self.backend.config.language
        ids = np.random.default_rng(3).integers(10, language.vocab_size - 10, count)
        return np.where(ids == language.image_token_id, 9, ids)

    def language(self, count: int, new: int, embeds: Any = None) -> Any:
        """The run that reads `count` tokens and writes `new`, greedily; the image's embeddings come first."""
        ids = self.text(count)
        if embeds is not None:
            ids[: embeds.shape[0]] = self.backend.config.language.image_token_id
        places = np.tile(np.arange(count), (3, 1))
        request = LanguageRequest(
            token_ids=ids, positions=places, next_position=count, image_embeds=embeds, max_new_tokens=new
        )
        return self.backend.language(request)

    def write(self, mark: Callable[[], None] = lambda: None, new: int | None = None) -> list[int]:
        """The tokens that follow the prompt; calls `mark` when the first is there."""
        text: list[int] = []
        session = self.language(self.work.prompt_tokens, self.work.new_tokens if new is None else new)
        for token in generate_tokens(session):
            if not text:
                mark()
            text.append(token)
        return text

    def hidden(self) -> Any:
        """Hidden states of the prompt alone (1, S, C)."""
        return self.language(self.work.prompt_tokens, 0).hidden()

    def prefixes(self, conditions: Sequence[Any]) -> list[Prefix]:
        """K/V of each branch's condition."""
        return [self.backend.prefix(c, self.times[:-1], self.work.image_tokens) for c in conditions]

    def steps(self, prefixes: Sequence[Prefix], scale: float = GUIDANCE, **lossy: Any) -> Iterator[DenoiseState]:
        """The state after each denoising step."""
        request = DenoiseRequest(
            latents=noise(self.backend.config, self.work),
            times=self.times,
            guided=prefixes[0],
            unguided=prefixes[1] if len(prefixes) > 1 else None,
            guidance_scale=scale if len(prefixes) > 1 else 1.0,
            **lossy,
        )
        return denoise(self.backend, request)

    def paint(self, prefixes: Sequence[Prefix], **lossy: Any) -> Any:
        """Latents at the end of the loop."""
        *_, last = self.steps(prefixes, **lossy)
        return last.latents

    def first_velocity(self, prefixes: Sequence[Prefix]) -> Any:
        """Velocity of the first step: the mean of both branches, so that guidance does not enlarge rounding."""
        return next(self.steps(prefixes, 0.5)).velocity

    def look(self, frame: Frame) -> Any:
        """Stage vision alone: embeddings of the reference image."""
        rows, columns = self.work.patches
        pixels = np.zeros((rows * columns, self.backend.config.vision.patch_dim), np.float32)
        with frame("vision"):
            return self.backend.vision(ImagePatches(pixels, (1, rows, columns)))

    def run(self, frame: Frame, **lossy: Any) -> tuple[Any, Any]:
        """Every stage in order, each within `frame`: (latents, pixels). What a later stage does not need is let go."""
        backend, work = self.backend, self.work
        embeds = self.look(frame) if work.patches[0] else None
        with frame("language.prefill"):
            thought = self.language(work.prompt_tokens, work.new_tokens, embeds)
            tokens = generate_tokens(thought)
            if work.new_tokens:
                next(tokens)
        with frame("language.decode"):
            for _ in range(work.new_tokens - 1):
                next(tokens)
        hidden = [thought.hidden(work.new_tokens)]
        if work.guidance:
            with frame("language.negative"):
                hidden.append(self.language(work.negative_tokens, 0).hidden())
        del embeds, thought, tokens
        with frame("connector"):
            conditions = [backend.connector(h) for h in hidden]
        with frame("prefix"):
            prefixes = self.prefixes(conditions)
        del hidden, conditions
        with frame("denoiser"):
            latents = self.paint(prefixes, **lossy)
        with frame("vae"):
            pixels = backend.vae(latents)
        return latents, pixels


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Sizes of a run: pixels a side, steps, tokens of the prompt, written, and of the negative prompt."""

    config: ModelConfig
    dtype: str
    sides: Sequence[int]
    steps: int
    prompt: int
    new: int
    negative: int

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def work(self, side: int | None = None) -> Workload:
        """The request at a size, the first one unless given, as the fast path runs it."""
        side = side or self.sides[0]
        return Workload(
            prompt_tokens=self.prompt, new_tokens=self.new, negative_tokens=self.negative,
            height=side, width=side, steps=self.steps, joint=True,
        )  # fmt: skip


def random_conditions(config: ModelConfig, work: Workload, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Conditions (1, L, C) of both branches."""
    generator = torch.Generator(device).manual_seed(1)
    width = config.decoder.stack.hidden_size
    return [torch.randn(1, n, width, device=device, generator=generator).to(dtype) for n in work.branches]


def dtype_of(model: MindOmniModel) -> str:
    """The type of its weights, such as "float32"."""
    return str(model.language.embed_tokens.weight.dtype).removeprefix("torch.")


def make_backend(
    model: MindOmniModel, device: str, precision: Precision | None = None, plan: Plan | None = None, impl: str = "auto"
) -> TorchCudaBackend:
    """The fast path over a model, whose block weights it takes; unquantized unless a precision is given.

    A plan's budget limits what runs beside the weights, as in `load`; the caller limits the process's memory.
    """
    precision = precision or Precision.uniform(dtype_of(model))
    options = FastOptions(precision=precision, plan=plan, impl=impl, limited=plan is not None and is_cuda(device))
    return TorchCudaBackend(model, device, options=options)
