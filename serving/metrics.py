"""What Prometheus reads at /metrics."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from mindomni_rt.events import AnswerEvent, Event, ImageEvent, StepEvent
from mindomni_rt.memory.gpus import gpus

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)


class Metrics:
    """One server's numbers, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.registry.register(_DeviceMemory())
        common: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("mindomni_requests", "Requests by route and outcome", ["route", "outcome"], **common)
        self.queue_length = Gauge("mindomni_queue_length", "Requests that wait", **common)
        self.queue_seconds = Histogram(
            "mindomni_queue_seconds", "Seconds that requests waited", buckets=_SECONDS, **common
        )
        self.request_seconds = Histogram(
            "mindomni_request_seconds", "Seconds from arrival to last byte", ["route"], buckets=_SECONDS, **common
        )
        self.stage_seconds = Histogram(
            "mindomni_stage_seconds", "Seconds of each stage of a request", ["stage"], buckets=_SECONDS, **common
        )
        self.tokens = Counter("mindomni_tokens", "Tokens written", **common)
        self.steps = Counter("mindomni_steps", "Denoising steps done, one for all images of a batch", **common)
        self.images = Counter("mindomni_images", "Images painted", **common)
        self.batch_size = Histogram(
            "mindomni_batch_size", "Equal requests painted as one", buckets=(1, 2, 4, 8, 16, 32), **common
        )

    def count(self, event: Event) -> None:
        """Adds what an event of the engine reports."""
        if isinstance(event, StepEvent):
            self.steps.inc()
        elif isinstance(event, (ImageEvent, AnswerEvent)):
            self.tokens.inc(len(event.result.token_ids))
            self.images.inc(len(event.result.images))
            for stage, seconds in event.result.timings.items():
                self.stage_seconds.labels(stage).observe(seconds)

    def text(self) -> bytes:
        """All of them in Prometheus' text form."""
        return generate_latest(self.registry)


class _DeviceMemory(Collector):
    def collect(self) -> Iterable[GaugeMetricFamily]:
        family = GaugeMetricFamily("mindomni_device_memory_bytes", "Memory of each GPU", labels=["device", "kind"])
        for gpu in gpus():
            for kind, size in (("total", gpu.total), ("free", gpu.free)):
                if size is not None:
                    family.add_metric([str(gpu.index), kind], size)
        yield family
