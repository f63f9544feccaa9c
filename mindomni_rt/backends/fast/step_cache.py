"""Step cache: when the first block's output hardly changes from one step to the next, the other blocks' is reused.

Lossy, off by default. The first block runs in every step; its residual is compared with that of the last full step, and
below the threshold the remaining blocks' residual of that step is added again. Both branches decide together. The host
reads one number a step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .denoise import DenoiseLoop

MOST_IN_A_ROW = 3  # reused steps before a full one


class StepCache:
    """Over a `DenoiseLoop`, whose graphs keep pointing at its buffers: one cache a loop, `begin` for each request."""

    def __init__(self, loop: DenoiseLoop) -> None:
        self._loop, self._threshold = loop, 0.0
        self._row = self.reused = self._branches = 0
        width = loop.embed(1).shape[-1]
        rows = loop.shape.branches * loop.shape.images
        self._first, self._reference, self._rest = (
            torch.zeros(rows, loop.tokens, width, dtype=loop.embed(1).dtype, device=loop.latents.device)
            for _ in range(3)
        )
        self._change = torch.zeros((), device=loop.latents.device)
        self._residual = torch.zeros_like(self._first)

    def begin(self, threshold: float) -> None:
        """A new request. threshold: relative change of the first block's residual below which a step is reused."""
        self._threshold = threshold
        self._row = self.reused = self._branches = 0

    def velocity(self, branches: int, with_image: bool, edge: bool) -> Tensor:
        """As `DenoiseLoop.velocity`. edge: the first or last step, which is always whole."""
        loop, rows = self._loop, slice(0, branches * self._loop.shape.images)

        def first_block() -> None:
            x = loop.embed(branches)
            first = loop.run(x, branches, with_image, 0, 1)
            self._first[rows] = first
            residual = first - x
            self._residual[rows] = residual
            reference = self._reference[rows].float()
            self._change.copy_((residual.float() - reference).abs().mean() / reference.abs().mean().clamp_min(1e-12))

        def whole() -> None:
            last = loop.run(self._first[rows], branches, with_image, 1)
            self._rest[rows] = last - self._first[rows]
            self._reference[rows] = self._residual[rows]
            loop.finish(last, branches)

        def again() -> None:
            loop.finish(self._first[rows] + self._rest[rows], branches)

        key = (branches, with_image)
        loop.graph(("first", *key), first_block)()
        fresh = branches != self._branches or edge or self._row >= MOST_IN_A_ROW or not with_image
        self._branches = branches if with_image else 0
        if fresh or float(self._change) >= self._threshold:
            loop.graph(("rest", *key), whole)()
            self._row = 0
        else:
            loop.graph(("again", *key), again)()
            self._row += 1
            self.reused += 1
        return loop.velocities.unflatten(0, (loop.shape.branches, -1))[:branches]
