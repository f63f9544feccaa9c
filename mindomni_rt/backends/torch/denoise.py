"""Stage `denoiser` on PyTorch modules: latents integrated in float32, whatever type the model computes in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...model.attention import Workspace
from ...model.decoder import DiffusionDecoder, PrefixKV
from ...sampling.schedule import Step, guide
from .device import mark


@dataclass(frozen=True, kw_only=True)
class Branch:
    """One prefix, or a batch of them, and the image tokens' tables: what a velocity needs besides the latents.

    modulation (T, 2C) of all steps; cos, sin (N, D/2) or (B, N, D/2); positions (N, C); mask as in
    `DiffusionDecoder.denoise`.
    """

    decoder: DiffusionDecoder
    prefix: PrefixKV
    modulation: Tensor
    cos: Tensor
    sin: Tensor
    positions: Tensor
    workspace: Workspace | None = None
    mask: Tensor | None = None

    def velocity(self, latents: Tensor, step: Step) -> Tensor:
        """Float32 velocity (B, 4, h, w) at float32 latents."""
        return self.decoder.denoise(
            latents.to(self.decoder.x_embedder.proj.weight.dtype),
            self.prefix.keys,
            self.prefix.values,
            self.prefix.time_keys[step.index],
            self.prefix.time_values[step.index],
            self.modulation[step.index],
            self.cos,
            self.sin,
            self.positions,
            condition_only=step.condition_only,
            workspace=self.workspace,
            mask=self._mask(step),
        ).float()

    def _mask(self, step: Step) -> Tensor | None:
        if self.mask is None or not step.condition_only:
            return self.mask
        return self.mask[..., : self.prefix.length]  # that step has no other keys


def real_keys(lengths: Sequence[int], keys: int, device: torch.device) -> Tensor | None:
    """Which of a batch's keys are real, (B, 1, 1, keys): those of shorter conditions are padded to the longest.

    None where all have one length.
    """
    longest = max(lengths)
    if min(lengths) == longest:
        return None
    at = torch.arange(keys, device=device)
    real = (at < torch.tensor(lengths, device=device)[:, None]) | (at >= longest)
    return real[:, None, None]


class TorchDenoiseSession:
    """The reference implementation of `DenoiseSession`. without_gradients: `torch.no_grad` for modules in training."""

    latents: Tensor
    velocity: Tensor

    def __init__(
        self,
        branches: Sequence[Branch],
        latents: Tensor,
        without_gradients: Callable[[], AbstractContextManager[Any]] = torch.inference_mode,
    ) -> None:
        self._branches, self.latents, self._without_gradients = branches, latents, without_gradients

    def step(self, step: Step) -> None:
        with self._without_gradients():
            velocities = [branch.velocity(self.latents, step) for branch in self._branches[: step.branches]]
            velocity = velocities[0] if len(velocities) == 1 else guide(velocities[0], velocities[1], step.scale)
            move = step.weight * velocity
            if step.previous_weight:
                move = move + step.previous_weight * self.velocity
            self.latents, self.velocity = self.latents + move, velocity

    def mark(self) -> Callable[[], None]:
        return mark(str(self.latents.device))

    def ahead(self, time: float) -> Tensor:
        with self._without_gradients():
            return self.latents + time * self.velocity
