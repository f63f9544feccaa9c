"""Stage `denoiser` on the fast path: both branches in one launch, nothing read back until the latents are asked for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...sampling.schedule import Step, guide
from ..torch.device import mark, on_device, working_on
from .buffers import StepBuffers
from .graph import memory_of
from .prefix import FastPrefix
from .step_cache import StepCache

logger = logging.getLogger(__name__)


class FastDenoiseSession:
    """`DenoiseSession` over static buffers, which the next session uses again: what it gives are copies.

    need: brings the decoder's weights to the device; a preview's VAE may have sent them away.
    """

    velocity: Tensor

    def __init__(
        self,
        buffers: StepBuffers,
        prefixes: Sequence[FastPrefix],
        need: Callable[[], None],
        cache: StepCache | None = None,
    ) -> None:
        self.buffers = buffers
        self._times = [p.at_times(buffers.device) for p in prefixes]
        self._last = len(prefixes[0].modulation) - 1
        self._need, self._cache, self.device = need, cache, buffers.device

    @on_device
    @torch.inference_mode()
    def step(self, step: Step) -> None:
        with memory_of("denoiser"):
            velocities = self.velocities(step)
        velocity = velocities[0].clone() if step.branches == 1 else guide(velocities[0], velocities[1], step.scale)
        move = step.weight * velocity
        if step.previous_weight:
            move += step.previous_weight * self.velocity
        self.buffers.latents += move
        self.velocity = velocity

    def mark(self) -> Callable[[], None]:
        return mark(self.device)

    @on_device
    @torch.inference_mode()
    def velocities(self, step: Step) -> Tensor:
        """Velocities (branches, n, 4, h, w) at the current latents, a view of the buffer."""
        self._need()
        self.buffers.at_step(self._times, step.index)
        if self._cache is None:
            return self.buffers.velocity(step.branches, not step.condition_only)
        found = self._cache.velocity(step.branches, not step.condition_only, edge=step.index in (0, self._last))
        if step.index == self._last:
            logger.info("step cache: %d of %d steps used it", self._cache.reused, self._last + 1)
        return found

    @property
    def latents(self) -> Tensor:
        with working_on(self.device), torch.inference_mode():
            return self.buffers.latents.clone()

    @on_device
    @torch.inference_mode()
    def ahead(self, time: float) -> Tensor:
        return self.buffers.latents + time * self.velocity
