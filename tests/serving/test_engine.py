"""The queue and its thread: order, bounds, batches, cancelling, stopping. The model is the real small one."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

import mindomni_rt
from mindomni_rt.errors import BadRequestError, GenerationCancelled, OutOfMemoryError
from mindomni_rt.events import ImageEvent, StepEvent, TextEvent
from mindomni_rt.request import Request, UnderstandRequest
from mindomni_rt.serving.engine import Engine
from mindomni_rt.serving.errors import ApiError
from mindomni_rt.serving.jobs import Job, equal_jobs
from serving.serving_tools import BUNDLE, PROMPT, SMALL, same

SLOW = Request(prompt="slow", think=False, **{**SMALL, "num_inference_steps": 1000})


class Collected:
    """A job whose events are kept."""

    def __init__(self, request: Request | UnderstandRequest) -> None:
        self.items: list[Any] = []
        self.ended = threading.Event()
        self.started = threading.Event()
        self.job = Job(request=request, put=self._put)

    def _put(self, item: Any) -> None:
        self.items.append(item)
        self.started.set()
        if isinstance(item, (Exception, ImageEvent, mindomni_rt.AnswerEvent)):
            self.ended.set()

    def result(self) -> Any:
        assert self.ended.wait(60)
        last = self.items[-1]
        return last if isinstance(last, Exception) else last.result


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = Engine(lambda: mindomni_rt.load(BUNDLE, device="cpu"), max_queue=4, max_batch=8)
    made.start()
    wait_for(made, "ready")
    yield made
    made.stop()
    made.join(30)


def wait_for(engine: Engine, state: str) -> None:
    end = time.monotonic() + 60
    while engine.state != state:
        assert time.monotonic() < end
        time.sleep(0.005)


def submit(engine: Engine, request: Request | UnderstandRequest) -> Collected:
    found = Collected(request)
    engine.submit(found.job)
    return found


def small(**options: Any) -> Request:
    return Request(**{"prompt": PROMPT, **SMALL, **options})


def test_equal_requests_are_painted_as_one_and_each_is_as_alone(engine: Engine, pipe: mindomni_rt.Pipeline) -> None:
    first = submit(engine, SLOW)
    first.started.wait(60)
    seeds, counts = (7, 100, 7), (1, 2, 1)
    jobs = [submit(engine, small(seed=s, num_images=n, preview_every=1)) for s, n in zip(seeds, counts, strict=True)]
    engine.cancel(first.job)
    results = [job.result() for job in jobs]
    assert engine.metrics.registry.get_sample_value("mindomni_batch_size_sum") == 3
    for seed, count, result, job in zip(seeds, counts, results, jobs, strict=True):
        alone = list(pipe.stream(small(seed=seed, num_images=count, preview_every=1)))
        assert len(job.items) == len(alone)
        for mine, other in zip(job.items, alone, strict=True):
            assert type(mine) is type(other)
            if isinstance(mine, TextEvent):
                assert mine == other
            if isinstance(mine, StepEvent):
                assert all(same(a, b) for a, b in zip(mine.preview or [], other.preview or [], strict=True))
        expected = alone[-1].result
        assert len(result.images) == count and all(map(same, result.images, expected.images))
        assert result.seed == seed and result.settings == expected.settings
        assert (result.text, result.token_ids) == (expected.text, expected.token_ids)


def test_what_is_not_equal_is_not_joined() -> None:
    def job(request: Any) -> Job:
        return Job(request=request, put=lambda _: None)

    first = job(small(seed=1))
    others = [
        job(small(seed=1, prompt="other")),
        job(small(seed=1, height=32)),
        job(small(seed=1, num_inference_steps=3)),
        job(small(seed=1, temperature=1.0)),
        job(small(seed=1, step_cache=0.1)),
        job(small(seed=1, preview_every=1)),
        job(small(seed=1, image=b"x")),
        job(UnderstandRequest(prompt=PROMPT)),
    ]
    assert equal_jobs([first, *others], 8) == [first]
    for one in others:
        assert equal_jobs([first, one], 8) == [first] and equal_jobs([one, first], 8) == [one]
    warm = [job(small(seed=1, temperature=1.0)) for _ in range(2)]
    assert equal_jobs(warm, 8) == warm[:1]
    assert len(equal_jobs([job(small(num_images=3)) for _ in range(4)], 8)) == 2
    large = [job(small(height=3072, width=3072)) for _ in range(20)]
    assert len(equal_jobs(large, 256)) == 14  # of 2^27 pixels


def test_a_batch_that_does_not_fit_runs_one_by_one(pipe: mindomni_rt.Pipeline) -> None:
    """No event comes twice."""

    class Narrow:
        close = staticmethod(lambda: None)

        def stream(self, request: Request, **options: Any) -> Iterator[Any]:
            for event in pipe.stream(request, **options):
                if request.num_images > 1 and isinstance(event, StepEvent):
                    raise OutOfMemoryError("two images do not fit")
                yield event

    engine = Engine(Narrow, max_batch=8)  # type: ignore[arg-type]
    jobs = [Collected(small(seed=s)) for s in (1, 2)]
    engine._waiting += [job.job for job in jobs]
    engine.start()
    results = [job.result() for job in jobs]
    for seed, job, result in zip((1, 2), jobs, results, strict=True):
        alone = list(pipe.stream(small(seed=seed)))
        assert [type(e) for e in job.items] == [type(e) for e in alone]
        assert same(result.images[0], alone[-1].result.images[0])
    engine.stop()


def test_the_queue_is_bounded(engine: Engine) -> None:
    first = submit(engine, SLOW)
    first.started.wait(60)
    waiting = [submit(engine, SLOW) for _ in range(4)]
    with pytest.raises(ApiError) as caught:
        submit(engine, SLOW)
    assert caught.value.status == 429 and int(caught.value.headers["retry-after"]) >= 1
    engine.cancel(waiting[0].job)  # who leaves makes room
    last = submit(engine, UnderstandRequest(prompt="x", max_new_tokens=2))
    for job in (first, *waiting):
        engine.cancel(job.job)
    assert last.result().token_ids


def test_cancelling_takes_effect_within_a_step(engine: Engine) -> None:
    first = submit(engine, SLOW)
    first.started.wait(60)
    engine.cancel(first.job)
    seen = len(first.items)
    after = submit(engine, small(seed=1))
    after.result()
    assert len(first.items) <= seen + 1 < 900


def test_one_of_a_batch_may_leave(engine: Engine, pipe: mindomni_rt.Pipeline) -> None:
    first = submit(engine, SLOW)
    first.started.wait(60)
    one, other = (submit(engine, small(seed=s, num_inference_steps=200)) for s in (1, 2))
    engine.cancel(first.job)
    one.started.wait(60)
    engine.cancel(one.job)
    assert same(other.result().images[0], pipe.generate(small(seed=2, num_inference_steps=200)).images[0])
    assert not one.ended.is_set()


def test_streaming_from_other_threads(engine: Engine, pipe: mindomni_rt.Pipeline) -> None:
    """The same signature as the pipeline's, for pages that run in the server."""
    events = list(engine.stream(PROMPT, seed=7, **SMALL))
    assert same(events[-1].result.images[0], pipe.generate(PROMPT, seed=7, **SMALL).images[0])
    cancel = threading.Event()
    with pytest.raises(GenerationCancelled):
        for event in engine.stream(SLOW, cancel=cancel):
            assert isinstance(event, StepEvent)
            cancel.set()
    with pytest.raises(BadRequestError, match="did you mean seed"):
        engine.stream(PROMPT, sed=7)
    events_ = engine.stream(SLOW)
    next(iter(events_))
    events_.close()  # type: ignore[attr-defined]
    assert list(engine.stream(UnderstandRequest(prompt="x", max_new_tokens=2)))


def test_loading_stopping_and_failing() -> None:
    hold = threading.Event()
    engine = Engine(lambda: hold.wait(60) and mindomni_rt.load(BUNDLE, device="cpu"))  # type: ignore[arg-type,return-value]
    engine.start()
    with pytest.raises(ApiError) as caught:
        submit(engine, SLOW)
    assert (caught.value.status, caught.value.code) == (503, "loading") and caught.value.headers["retry-after"]
    hold.set()
    wait_for(engine, "ready")
    running, waiting = submit(engine, SLOW), submit(engine, small(seed=1))
    running.started.wait(60)
    engine.stop(grace=60)
    with pytest.raises(ApiError, match="being stopped"):
        submit(engine, SLOW)
    engine.cancel(running.job)
    assert waiting.result().images  # accepted before the stop: finished
    engine.join(30)

    told: list[bool] = []
    broken = Engine(lambda: mindomni_rt.load("/nowhere/at/all"), on_failure=lambda: told.append(True))
    broken.start()
    wait_for(broken, "failed")
    broken.join(10)
    assert told and isinstance(broken.failure, mindomni_rt.MindOmniError)
    with pytest.raises(ApiError, match="failed"):
        submit(broken, SLOW)


def test_the_end_of_grace_is_an_error_for_everyone(engine: Engine) -> None:
    running, waiting = submit(engine, SLOW), submit(engine, small(seed=1))
    running.started.wait(60)
    engine.stop(grace=0.05)
    for job in (running, waiting):
        assert job.result().code == "stopping"
    engine.join(30)


def test_errors_end_one_request_and_repeated_ones_the_engine(caplog: pytest.LogCaptureFixture) -> None:
    class Bad:
        close = staticmethod(lambda: None)

        def stream(self, request: Request, **_: Any) -> Iterator[Any]:
            raise RuntimeError(f"cannot paint {request.prompt}")

    works = [True, False]

    def probe(_: Any) -> None:
        if not works.pop(0):
            raise RuntimeError("the device is gone")

    engine = Engine(Bad, probe=probe)  # type: ignore[arg-type]
    engine.start()
    wait_for(engine, "ready")
    for number in range(6):  # requests alone do not end it: the device is tried after three, and after three more
        assert isinstance(submit(engine, small(prompt="a secret wish")).result(), RuntimeError), number
    wait_for(engine, "failed")
    engine.join(10)
    assert "RuntimeError" in caplog.text and "secret" not in caplog.text
