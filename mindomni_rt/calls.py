"""The calls that wait for a result: each reads a stream of events to its end."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, Unpack

from .checks import shown
from .errors import BadRequestError, GenerationCancelled
from .events import AnswerEvent, Event, GenerationResult, ImageEvent
from .progress import with_progress
from .request import (
    EditOptions,
    GenerateOptions,
    Request,
    UnderstandOptions,
    UnderstandRequest,
    as_request,
    check_callback,
    check_cancel,
)

Callback = Callable[[Event], bool | None]


class Calls(ABC):
    """`generate`, `generate_batch`, `edit` and `understand`, made of `stream` and `stream_batch`."""

    @abstractmethod
    def stream(
        self,
        request: str | Request | UnderstandRequest,
        *,
        cancel: threading.Event | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Generator[Event, None, None]:
        """A request as events."""

    @abstractmethod
    def stream_batch(
        self,
        prompts: Sequence[str | Request],
        *,
        cancel: threading.Event | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Generator[Event, None, None]:
        """Several prompts as events."""

    def generate(
        self,
        prompt: str | Request,
        *,
        callback: Callback | None = None,
        cancel: threading.Event | None = None,
        progress: bool = False,
        **options: Unpack[GenerateOptions],
    ) -> GenerationResult:
        """Thinks about the prompt and paints the result.

        Args:
            prompt: the text, or a `Request` that holds everything.
            callback: called with each event; returning False cancels.
            cancel: setting it, from any thread, ends the request after the current token or step.
            progress: shows words and steps on standard error.
            **options: the fields of `Request`, which documents each with its default and limits. The settings of a
                result or of a saved picture (`read_settings`) are such options: they repeat it.

        Raises:
            BadRequestError: an option is unknown, out of its limits, or missing on this backend.
            GenerationCancelled: the request was cancelled.

        Example:
            >>> result = pipe.generate("an animal with (3 + 6) lives", seed=7)  # doctest: +SKIP
            >>> result.images[0].save("cat.png")  # doctest: +SKIP
        """
        cancel = check_cancel(cancel) or threading.Event()
        return _results(self.stream(prompt, cancel=cancel, **options), callback, cancel, progress)[0]

    def generate_batch(
        self,
        prompts: Sequence[str | Request],
        *,
        callback: Callback | None = None,
        cancel: threading.Event | None = None,
        progress: bool = False,
        **options: Unpack[GenerateOptions],
    ) -> list[GenerationResult]:
        """`generate` for several prompts, each a text or a `Request`; the results are in their order.

        Neighbours with equal settings are painted as one batch where the backend can. Each result is that of its
        prompt alone, up to rounding. With `seed`, text i has seed + i · num_images; each result tells its own. The
        other arguments and errors are those of `generate`.

        Example:
            >>> cat, dog = pipe.generate_batch(["a cat", "a dog"], seed=7)  # doctest: +SKIP
        """
        cancel = check_cancel(cancel) or threading.Event()
        return _results(self.stream_batch(prompts, cancel=cancel, **options), callback, cancel, progress)

    def edit(
        self,
        image: Any,
        prompt: str,
        *,
        callback: Callback | None = None,
        cancel: threading.Event | None = None,
        progress: bool = False,
        **options: Unpack[EditOptions],
    ) -> GenerationResult:
        """`generate` with a reference image: the same, with the image first.

        Without height and width the size is the image's in multiples of 16, within what the model paints
        (`recommended`). Arguments and errors are those of `generate`.
        """
        require_image(image)
        return self.generate(prompt, callback=callback, cancel=cancel, progress=progress, **{"image": image, **options})

    def understand(
        self,
        prompt: str | UnderstandRequest,
        image: Any = None,
        *,
        callback: Callback | None = None,
        cancel: threading.Event | None = None,
        progress: bool = False,
        **options: Unpack[UnderstandOptions],
    ) -> GenerationResult:
        """Answers in words, about an image if one is given.

        prompt: the question, or an `UnderstandRequest` that holds everything. options: the fields of
        `UnderstandRequest`. callback, cancel, progress and errors are those of `generate`.
        """
        cancel = check_cancel(cancel) or threading.Event()
        request = as_request(UnderstandRequest, prompt, options if image is None else {"image": image, **options})
        return _results(self.stream(request, cancel=cancel), callback, cancel, progress)[0]


def require_image(image: Any) -> None:
    """Raises BadRequestError for an edit without its reference."""
    if image is None:
        raise BadRequestError("image None: an edit needs a picture to change; without one, call generate")


def _results(
    events: Iterator[Event], callback: Callback | None, cancel: threading.Event, progress: bool
) -> list[GenerationResult]:
    results: list[GenerationResult] = []
    check_callback(callback)
    if not isinstance(progress, bool):
        raise BadRequestError(f"progress {shown(progress)}: expected True or False")
    for event in with_progress(events) if progress else events:
        if callback is not None and callback(event) is False:
            cancel.set()
            if isinstance(event, (ImageEvent, AnswerEvent)):  # no step is left that would see it
                raise GenerationCancelled("cancelled by the callback")
        if isinstance(event, (ImageEvent, AnswerEvent)):
            results.append(event.result)
    return results
