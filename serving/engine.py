"""One model on one device: a bounded queue, and the thread that serves it, one request or batch at a time."""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from mindomni_rt.errors import GenerationCancelled, MindOmniError, OutOfMemoryError
from mindomni_rt.events import AnswerEvent, Event, ImageEvent
from mindomni_rt.request import Request, UnderstandRequest, as_request

from . import errors
from .jobs import Job, equal_jobs, merged, share
from .metrics import Metrics

if TYPE_CHECKING:
    from mindomni_rt.pipeline import Pipeline

logger = logging.getLogger(__name__)
State = Literal["loading", "ready", "stopping", "failed"]
_MOST_FAILURES = 3  # unexpected errors in a row, after which the device is tried with a request of its own


class Engine:
    """Loads a model in its own thread and runs what is submitted. `stream` has the signature of `Pipeline.stream`."""

    def __init__(
        self,
        load: Callable[[], Pipeline],
        *,
        max_queue: int = 64,
        max_batch: int = 8,
        metrics: Metrics | None = None,
        probe: Callable[[Pipeline], object] = bool,
        on_failure: Callable[[], None] | None = None,
    ) -> None:
        """probe: uses a model that gave unexpected errors, and raises if it is the device that does not work.
        on_failure: called once, by the engine's thread, if the model cannot be loaded or stops working."""
        self.max_queue, self.max_batch = max_queue, max_batch
        self.metrics = metrics or Metrics()
        self.state: State = "loading"
        self.failure: BaseException | None = None
        self._load, self._probe, self._on_failure = load, probe, on_failure
        self._waiting: list[Job] = []
        self._running: Sequence[Job] = ()
        self._change = threading.Condition()
        self._aborted = threading.Event()
        self._timer: threading.Timer | None = None
        self._seconds = 1.0  # of one group, a moving mean
        self._failures = 0
        # A daemon: reading gigabytes cannot be interrupted, and must not hold up the end of the process.
        self._thread = threading.Thread(target=self._serve, name="mindomni-engine", daemon=True)

    def start(self) -> None:
        """Begins to load the model; does nothing where that has begun."""
        if self._thread.ident is None:
            self._thread.start()

    def wait_loaded(self) -> None:
        """Waits until the model is loaded. Raises what loading raised."""
        with self._change:
            while self.state == "loading":
                self._change.wait()
        if self.failure is not None:
            raise self.failure

    def submit(self, job: Job) -> None:
        """Puts a job into the queue. Raises ApiError where it is full, or the engine is not ready."""
        with self._change:
            self._require_ready()
            if len(self._waiting) >= self.max_queue:
                raise errors.queue_full(len(self._waiting), self.retry_after())
            self._waiting.append(job)
            self.metrics.queue_length.set(len(self._waiting))
            self._change.notify()

    def _require_ready(self) -> None:
        if self.state != "ready":
            raise {"loading": errors.loading, "stopping": errors.stopping, "failed": errors.broken}[self.state]()

    def cancel(self, job: Job) -> None:
        """Nobody waits for this job any more: it leaves the queue, or ends after the current token or step."""
        job.gone.set()
        with self._change:
            if job in self._waiting:
                self._waiting.remove(job)
                self.metrics.queue_length.set(len(self._waiting))

    def retry_after(self) -> int:
        """Seconds until there may be room, at least 1."""
        return max(1, min(600, math.ceil(self._seconds * (len(self._waiting) + 1) / 2)))

    def stream(
        self, request: str | Request | UnderstandRequest, *, cancel: threading.Event | None = None, **options: Any
    ) -> Iterator[Event]:
        """A request as events, through the queue: for callers in this process, such as a page.

        Raises at the call what `Pipeline.stream` raises, and ApiError where the queue is full or the model not ready.
        """
        if not isinstance(request, UnderstandRequest):
            request = as_request(Request, request, options)
        arrived: queue.SimpleQueue[Event | Exception] = queue.SimpleQueue()
        job = Job(request=request, put=arrived.put)
        self.submit(job)
        return self._events(job, arrived, cancel)

    def _events(
        self, job: Job, arrived: queue.SimpleQueue[Event | Exception], cancel: threading.Event | None
    ) -> Iterator[Event]:
        try:
            while True:
                try:
                    item = arrived.get(timeout=0.1)
                except queue.Empty:
                    if cancel is not None and cancel.is_set():
                        raise GenerationCancelled("cancelled by the caller") from None
                    continue
                if isinstance(item, Exception):
                    raise item
                yield item
                if isinstance(item, (ImageEvent, AnswerEvent)):
                    return
                if cancel is not None and cancel.is_set():
                    raise GenerationCancelled("cancelled by the caller")
        finally:
            self.cancel(job)

    def stop(self, grace: float = 0.0) -> None:
        """Refuses new jobs from now on. Accepted ones have `grace` seconds; then they end with an error.

        A second call sets the time anew.
        """
        with self._change:
            if self.state in ("loading", "ready"):
                self.state = "stopping"
            if self._timer is not None:
                self._timer.cancel()
            self._timer = threading.Timer(grace, self._abort)
            self._timer.daemon = True
            self._timer.start()
            self._change.notify_all()

    def join(self, timeout: float | None = None) -> None:
        """Waits for the thread's end after `stop`."""
        if self._thread.ident is not None:
            self._thread.join(timeout)
        if self._timer is not None:
            self._timer.cancel()

    def _abort(self) -> None:
        self._aborted.set()
        with self._change:
            refused, self._waiting = self._waiting, []
            self.metrics.queue_length.set(0)
        for job in refused:
            job.put(errors.stopping())

    def _serve(self) -> None:
        try:
            began = time.monotonic()
            pipe = self._load()
        except Exception as error:
            if not isinstance(error, MindOmniError):
                logger.exception("the model could not be loaded")
            self._fail(error)
            return
        logger.info("model loaded in %.1f s", time.monotonic() - began)
        with self._change:
            if self.state == "loading":
                self.state = "ready"
            self._change.notify_all()
        try:
            while self.state != "failed" and (group := self._next()):
                self._run(pipe, group)
                if self._failures >= _MOST_FAILURES:
                    self._try_device(pipe)
        except Exception as error:  # noqa: BLE001 as above; requests that wait must not wait for ever
            logger.error("%s in the engine's thread", type(error).__name__)
            self._fail(error)
        finally:
            pipe.close()

    def _fail(self, error: BaseException) -> None:
        with self._change:
            self.state, self.failure = "failed", error
            refused, self._waiting = [*self._running, *self._waiting], []
            self._change.notify_all()
        for job in refused:
            job.put(errors.broken())
        if self._on_failure is not None:
            self._on_failure()

    def _next(self) -> list[Job]:
        """The next job with the equal ones behind it; none once the engine stops and nothing waits."""
        with self._change:
            while not self._waiting:
                if self.state != "ready":
                    return []
                self._change.wait()
            group = equal_jobs(self._waiting, self.max_batch)
            self._waiting = [job for job in self._waiting if job not in group]
            self._running = group
            self.metrics.queue_length.set(len(self._waiting))
            return group

    def _run(self, pipe: Pipeline, group: Sequence[Job]) -> None:
        began = time.monotonic()
        for job in group:
            self.metrics.queue_seconds.observe(began - job.arrived)
        try:
            self._paint(pipe, group)
            self._failures = 0
        except OutOfMemoryError as error:
            if len(group) == 1:
                _put_all(group, error)
                return
            logger.warning("%d equal requests do not fit the memory at once; each runs by itself", len(group))
            for job in group:
                self._run(pipe, [job])
        except GenerationCancelled as error:
            _put_all(group, errors.stopping() if self._aborted.is_set() else error)
        except MindOmniError as error:
            _put_all(group, error)
        except Exception as error:  # noqa: BLE001 one request must not end the server
            # Without the exception's own text, which may hold what a client wrote.
            trace = "".join(traceback.format_tb(error.__traceback__))
            logger.error("%s in the engine\n%s", type(error).__name__, trace)
            _put_all(group, error)
            self._failures += 1
        finally:
            self._running = ()
            self._seconds += (time.monotonic() - began - self._seconds) * 0.2

    def _try_device(self, pipe: Pipeline) -> None:
        """Clients' requests alone cannot end the engine: only where a known one fails too is the device broken."""
        try:
            self._probe(pipe)
            self._failures = 0
        except Exception as error:  # noqa: BLE001 whatever it is, the device does not work
            self._fail(error)

    def _paint(self, pipe: Pipeline, group: Sequence[Job]) -> None:
        cancel: Any = _Nobody(group, self._aborted)
        for seen, event in enumerate(pipe.stream(merged(group), cancel=cancel), 1):
            self.metrics.count(event)
            for index, job in enumerate(group):
                # A job that runs again by itself has the first events already: those of both runs are the same.
                if job.events < seen and not job.gone.is_set():
                    job.events = seen
                    job.put(share(event, group, index))
        self.metrics.batch_size.observe(len(group))


class _Nobody:
    """Set once nobody waits for any of these jobs, or the engine gives up: the `cancel` of a group."""

    def __init__(self, group: Sequence[Job], aborted: threading.Event) -> None:
        self._group, self._aborted = group, aborted

    def is_set(self) -> bool:
        return self._aborted.is_set() or all(job.gone.is_set() for job in self._group)


def _put_all(group: Sequence[Job], error: Exception) -> None:
    for job in group:
        job.put(error)
