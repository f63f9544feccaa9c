"""Step cache: when the first block's output hardly changes from one step to the next, the other blocks' is reused.

Lossy, off by default. The first block runs in every step; its residual is compared with that of the last full step, and
below the threshold the remaining blocks' residual of that step is added again. Both branches decide together. The host
reads one number a step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .buffers import StepBuffers

MOST_IN_A_ROW = 3  # reused steps before a full one


class StepCache:
    """Over `StepBuffers`, whose graphs read its tensors: one cache for a set of buffers, `begin` for each request."""

    def __init__(self, buffers: StepBuffers) -> None:
        self._buffers, self._threshold = buffers, 0.0
        self._row = self.reused = self._branches = 0
        width = buffers.embed(1).shape[-1]
        rows = buffers.shape.branches * buffers.shape.images
        self._first, self._reference, self._rest = (
            torch.zeros(rows, buffers.tokens, width, dtype=buffers.embed(1).dtype, device=buffers.latents.device)
            for _ in range(3)
        )
        self._change = torch.zeros((), device=buffers.latents.device)

    def begin(self, threshold: float) -> None:
        """A new request. threshold: relative change of the first block's residual below which a step is reused."""
        self._threshold = threshold
        self._row = self.reused = self._branches = 0

    def velocity(self, branches: int, with_image: bool, edge: bool) -> Tensor:
        """As `StepBuffers.velocity`. edge: the first or last step, which is always whole."""
        buffers, rows = self._buffers, slice(0, branches * self._buffers.shape.images)

        def first_block() -> None:
            x = buffers.embed(branches)
            first = buffers.run(x, branches, with_image, 0, 1)
            self._first[rows] = first
            reference = self._reference[rows].float()
            change = (first - x).float() - reference
            self._change.copy_(change.abs().mean() / reference.abs().mean().clamp_min(1e-12))

        def whole() -> None:
            last = buffers.run(self._first[rows], branches, with_image, 1)
            self._rest[rows] = last - self._first[rows]
            self._reference[rows] = self._first[rows] - buffers.embed(branches)
            buffers.finish(last, branches)

        def again() -> None:
            buffers.finish(self._first[rows] + self._rest[rows], branches)

        key = (branches, with_image)
        buffers.graph(("first", *key), first_block)()
        fresh = branches != self._branches or edge or self._row >= MOST_IN_A_ROW or not with_image
        self._branches = branches if with_image else 0
        if fresh or float(self._change) >= self._threshold:
            buffers.graph(("rest", *key), whole)()
            self._row = 0
        else:
            buffers.graph(("again", *key), again)()
            self._row += 1
            self.reused += 1
        return buffers.velocities.unflatten(0, (buffers.shape.branches, -1))[:branches]
