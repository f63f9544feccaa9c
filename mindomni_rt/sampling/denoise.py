"""The denoising loop: the only one, for every backend and for training's rollouts.

A backend offers a session over latents on its device; which branches run, how guidance combines them, how far the
latents move and when the loop stops is decided here.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from ..backends.base import IN_FLIGHT, Array, Backend, DenoiseRequest, DenoiseSession
from ..errors import GenerationCancelled
from .schedule import Step, plan_steps


@dataclass(frozen=True, kw_only=True)
class DenoiseState:
    """Where the loop is after a step (1 … total). Read it before the next step: the session moves on."""

    step: int
    total: int
    outlook: float
    session: DenoiseSession

    @property
    def latents(self) -> Array:
        """Latents (n, 4, h, w), float32, on the device."""
        return self.session.latents

    @property
    def velocity(self) -> Array:
        """The step's velocity after guidance, (n, 4, h, w)."""
        return self.session.velocity

    @property
    def preview(self) -> Array:
        """Latents (n, 4, h, w) where this velocity leads if followed to the end: clearer than the noisy ones."""
        return self.session.ahead(self.outlook)


def check(cancel: threading.Event | None) -> None:
    """Raises GenerationCancelled once `cancel` is set."""
    if cancel is not None and cancel.is_set():
        raise GenerationCancelled("cancelled by the caller")


def denoise(backend: Backend, request: DenoiseRequest) -> Iterator[DenoiseState]:
    """Runs a request on a backend, a state after each step. Raises GenerationCancelled."""
    steps = plan_steps(
        request.times,
        1 if request.unguided is None else 2,
        request.guidance_scale,
        request.guidance_interval,
        request.solver,
        request.first_step,
    )
    check(request.cancel)
    yield from run_steps(backend.denoiser(request), steps, request.cancel)


def run_steps(
    session: DenoiseSession, steps: Iterable[Step], cancel: threading.Event | None = None
) -> Iterator[DenoiseState]:
    """Takes a session through planned steps, at most IN_FLIGHT of them ahead of its device."""
    steps, waits = list(steps), deque[Callable[[], None]]()
    for step in steps:
        check(cancel)
        session.step(step)
        waits.append(session.mark())
        if len(waits) > IN_FLIGHT:
            waits.popleft()()
        yield DenoiseState(step=step.index + 1, total=len(steps), outlook=step.outlook, session=session)
    check(cancel)
