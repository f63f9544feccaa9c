"""A job's events on the way to its client: until the end, the deadline, or the client's leaving."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
import traceback
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import StreamingResponse

from mindomni_rt.errors import MindOmniError
from mindomni_rt.events import AnswerEvent, Event, GenerationResult, ImageEvent
from mindomni_rt.request import Request, UnderstandRequest

from . import errors, gate
from .engine import Engine
from .errors import ApiError, api_error
from .jobs import Job

logger = logging.getLogger(__name__)
PING_SECONDS = 15.0
_PATIENCE = 10.0  # seconds for which an answer in pieces may still become an error with a status of its own


class ClientGone(Exception):
    """Nobody is there to read an answer."""


class Following:
    """The events of a request that was put into the queue; iterate over it once.

    Raises ApiError at once where the queue does not take it; then, from the iteration, ApiError, MindOmniError and
    ClientGone. `close` runs at the latest when the HTTP request ends, so nothing goes on behind it.
    """

    def __init__(
        self, engine: Engine, request: Request | UnderstandRequest, http: HttpRequest, deadline: float
    ) -> None:
        """deadline: seconds from the arrival of the HTTP request."""
        loop = asyncio.get_running_loop()
        self._arrived: asyncio.Queue[Event | Exception] = asyncio.Queue()
        self._engine, self._deadline = engine, deadline
        self._end = http.state.arrived + deadline

        def put(item: Event | Exception) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(self._arrived.put_nowait, item)

        self._job = Job(request=request, put=put)
        engine.submit(self._job)
        self._gone = asyncio.ensure_future(_until_gone(http))
        gate.at_end(http.scope, self.close)

    def close(self) -> None:
        """Nobody waits for more."""
        self._gone.cancel()
        self._engine.cancel(self._job)

    async def __aiter__(self) -> AsyncIterator[Event]:
        while True:
            item = await self._next()
            yield item
            if isinstance(item, (ImageEvent, AnswerEvent)):
                return

    async def _next(self) -> Event:
        found = asyncio.ensure_future(self._arrived.get())
        try:
            left = max(0.0, self._end - time.monotonic())
            await asyncio.wait({found, self._gone}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if not found.done():
                raise ClientGone if self._gone.done() else errors.too_late(self._deadline)
        finally:
            found.cancel()
        item = found.result()
        if isinstance(item, Exception):
            raise item
        return item


async def _until_gone(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def finished(events: Following, see: Callable[[Event], object] = bool) -> GenerationResult:
    """The result at the end; `see` is called with each event."""
    async for event in events:
        see(event)
        if isinstance(event, (ImageEvent, AnswerEvent)):
            return event.result
    raise AssertionError("a stream of events without an end")


def sse(data: Any, name: str | None = None) -> bytes:
    """One server-sent event."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {data if isinstance(data, str) else json.dumps(data)}\n\n".encode()


async def streamed(pieces: AsyncIterator[bytes], http: HttpRequest) -> StreamingResponse:
    """Pieces as server-sent events. An error before the first is raised, and so gets its own status; a later one
    becomes an event that OpenAI's clients raise. Where the queue is long the answer begins without a piece."""
    first = asyncio.ensure_future(anext(pieces))
    try:
        await asyncio.wait({first}, timeout=_PATIENCE)
    except asyncio.CancelledError:
        first.cancel()
        raise
    if first.done() and first.exception() is not None:
        raise first.exception()  # type: ignore[misc]
    return StreamingResponse(
        _sent(first, pieces, http),
        media_type="text/event-stream",
        headers={"x-accel-buffering": "no"},
    )


async def _sent(
    current: asyncio.Future[bytes], pieces: AsyncIterator[bytes], http: HttpRequest
) -> AsyncIterator[bytes]:
    how: str | None = "cancelled"
    try:
        while True:
            done, _ = await asyncio.wait({current}, timeout=PING_SECONDS)
            if not done:
                yield b": waiting\n\n"
                continue
            try:
                piece = current.result()
            except StopAsyncIteration:
                how = None
                return
            except ClientGone:
                return
            except Exception as error:  # noqa: BLE001 the status is sent; the error goes the same way as the rest
                found = reported(error, http)
                how = found.code
                yield sse(found.body(), "error")
                return
            yield piece
            current = asyncio.ensure_future(anext(pieces))
    finally:
        current.cancel()
        gate.outcome(http.scope, how)


def reported(error: Exception, http: HttpRequest) -> ApiError:
    """An error as an answer; an unexpected one is logged, without its text, which may hold what the client wrote."""
    if not isinstance(error, (ApiError, MindOmniError)):
        trace = "".join(traceback.format_tb(error.__traceback__))
        logger.error("%s %s\n%s", http.state.request_id, type(error).__name__, trace)
    return api_error(error)
