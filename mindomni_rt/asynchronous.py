"""A pipeline for asyncio: the caller's event loop stays free, and a cancelled task stops its request within a step."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextlib import aclosing
from typing import Any, Unpack

from .calls import require_image
from .events import AnswerEvent, Event, GenerationResult, ImageEvent
from .pipeline import Pipeline
from .request import EditOptions, GenerateOptions, Request, UnderstandOptions, UnderstandRequest, as_request

_END = object()


class AsyncPipeline:
    """`Pipeline` with `await` and `async for`. Arguments, results and errors are those of its methods.

    A thread runs each request; requests wait for each other, as in `Pipeline`. Cancelling the task, leaving
    `async with aclosing(pipe.stream(…))` early, or a timeout ends the request after its current token or step, and the
    task ends only then: the model is free for the next one.

    Example:
        >>> pipe = AsyncPipeline(mindomni_rt.load("model"))  # doctest: +SKIP
        >>> result = await asyncio.wait_for(pipe.generate("three yellow circles"), timeout=60)  # doctest: +SKIP
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline

    async def generate(self, prompt: str | Request, **options: Unpack[GenerateOptions]) -> GenerationResult:
        """As `Pipeline.generate`."""
        return (await self._results(self.stream(prompt, **options)))[0]

    async def generate_batch(
        self, prompts: Sequence[str | Request], **options: Unpack[GenerateOptions]
    ) -> list[GenerationResult]:
        """As `Pipeline.generate_batch`."""
        return await self._results(self.stream_batch(prompts, **options))

    async def edit(self, image: Any, prompt: str, **options: Unpack[EditOptions]) -> GenerationResult:
        """As `Pipeline.edit`."""
        require_image(image)
        return await self.generate(prompt, image=image, **options)

    async def understand(
        self, prompt: str | UnderstandRequest, image: Any = None, **options: Unpack[UnderstandOptions]
    ) -> GenerationResult:
        """As `Pipeline.understand`."""
        request = as_request(UnderstandRequest, prompt, options if image is None else {"image": image, **options})
        return (await self._results(self.stream(request)))[0]

    @staticmethod
    async def _results(events: AsyncGenerator[Event, None]) -> list[GenerationResult]:
        async with aclosing(events):
            return [event.result async for event in events if isinstance(event, (ImageEvent, AnswerEvent))]

    def stream(
        self, request: str | Request | UnderstandRequest, **options: Unpack[GenerateOptions]
    ) -> AsyncGenerator[Event, None]:
        """As `Pipeline.stream`; mistakes in the request are raised at the first event."""
        return self._events(lambda cancel: self.pipeline.stream(request, cancel=cancel, **options))

    def stream_batch(
        self, prompts: Sequence[str | Request], **options: Unpack[GenerateOptions]
    ) -> AsyncGenerator[Event, None]:
        """As `Pipeline.stream_batch`; mistakes in the requests are raised at the first event."""
        return self._events(lambda cancel: self.pipeline.stream_batch(prompts, cancel=cancel, **options))

    @staticmethod
    async def _events(
        start: Callable[[threading.Event], Generator[Event, None, None]],
    ) -> AsyncGenerator[Event, None]:
        cancel = threading.Event()
        events = start(cancel)
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Any] = asyncio.Queue()

        def put(item: Any) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, item)

        worker = threading.Thread(target=_run, args=(events, put), name="mindomni request", daemon=True)
        worker.start()
        ended = False
        try:
            while True:
                item = await queue.get()
                ended = item is _END or isinstance(item, BaseException)
                if isinstance(item, BaseException):
                    raise item
                if ended:
                    return
                yield item
        finally:
            cancel.set()
            while not ended:  # within a step: what follows may use the model at once
                item = await queue.get()
                ended = item is _END or isinstance(item, BaseException)

    async def close(self) -> None:
        """As `Pipeline.close`: waits for the running request."""
        await asyncio.to_thread(self.pipeline.close)

    async def __aenter__(self) -> AsyncPipeline:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


def _run(events: Generator[Event, None, None], put: Callable[[Any], None]) -> None:
    """Reads a request's events to their end, on a thread of its own."""
    try:
        for event in events:
            put(event)
        last: Any = _END
    except BaseException as error:  # noqa: BLE001 the awaiting task raises it
        last = error
    finally:
        events.close()
    try:
        put(last)
    except RuntimeError:  # the loop was closed meanwhile: nobody waits
        return
