"""A request in the queue, and equal requests as one."""

from __future__ import annotations

import hashlib
import secrets
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np

from mindomni_rt.events import Event, GenerationResult, ImageEvent, StepEvent
from mindomni_rt.request import MAX_PIXELS, Request, UnderstandRequest
from mindomni_rt.sampling.random import batch_noise

_OWN = ("seed", "num_images", "image", "latents")


@dataclass(eq=False, kw_only=True)
class Job:
    """A request with its seed chosen, and where its events go. `put` is called by the engine's thread."""

    request: Request | UnderstandRequest
    put: Callable[[Event | Exception], None]
    arrived: float = field(default_factory=time.monotonic)
    gone: threading.Event = field(default_factory=threading.Event)
    """Set once nobody waits for the answer."""
    events: int = 0
    """Events delivered so far."""

    def __post_init__(self) -> None:
        if self.request.seed is None:
            self.request = replace(self.request, seed=secrets.randbits(32))
        self.key = _key(self.request)

    @property
    def count(self) -> int:
        """Images asked for; 1 for a question."""
        return self.request.num_images if isinstance(self.request, Request) else 1

    @property
    def seed(self) -> int:
        """Image i is painted from seed + i."""
        assert self.request.seed is not None
        return self.request.seed


def _key(request: Request | UnderstandRequest) -> Hashable | None:
    """Equal for requests that differ in their seeds and counts alone, so that one batch answers both; None for others.

    A seed decides the noise, and with a temperature the text too. The step cache measures a change over a whole batch.
    """
    if isinstance(request, UnderstandRequest) or request.temperature > 0 or request.step_cache > 0:
        return None
    if request.height is None or request.width is None:
        return None
    image = request.image
    if image is not None:
        if not isinstance(image, bytes):
            return None
        image = hashlib.sha256(image).digest()
    return (image, *(getattr(request, f.name) for f in fields(request) if f.name not in _OWN))


def equal_jobs(waiting: Sequence[Job], most: int) -> list[Job]:
    """The first job and those behind it that one batch of at most `most` images answers too."""
    first = waiting[0]
    group, images = [first], first.count
    if first.key is None or not isinstance(first.request, Request):
        return group
    most = min(most, MAX_PIXELS // (first.request.latent_shape[2] * first.request.latent_shape[3] * 64))
    for job in waiting[1:]:
        if job.key == first.key and images + job.count <= most:
            group.append(job)
            images += job.count
    return group


def merged(group: Sequence[Job]) -> Request | UnderstandRequest:
    """One request that answers a group of equal ones: their noise side by side, each as it would be alone."""
    first = group[0].request
    if len(group) == 1 or isinstance(first, UnderstandRequest):
        return first
    shape = first.latent_shape[1:]
    noise = np.concatenate([batch_noise(job.seed, job.count, shape) for job in group])
    return replace(first, num_images=len(noise), latents=noise)


def share(event: Event, group: Sequence[Job], index: int) -> Event:
    """The part of a group's event that belongs to one of its jobs."""
    if len(group) == 1:
        return event
    start = sum(job.count for job in group[:index])
    mine = slice(start, start + group[index].count)
    if isinstance(event, StepEvent) and event.preview is not None:
        return replace(event, preview=event.preview[mine])
    if isinstance(event, ImageEvent):
        return ImageEvent(_result(event.result, group[index], mine))
    return event


def _result(result: GenerationResult, job: Job, mine: slice) -> GenerationResult:
    settings = {**result.settings, "seed": job.seed, "num_images": job.count}
    return replace(result, images=result.images[mine], seed=job.seed, settings=settings, latents=None)
