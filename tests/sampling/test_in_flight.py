"""Steps that a device has yet to finish: few, so that progress is true and cancelling takes at most two steps."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mindomni_rt import GenerationCancelled
from mindomni_rt.backends.compiled.denoise import CompiledDenoiseSession
from mindomni_rt.backends.compiled.trt import TensorRTRunner
from mindomni_rt.backends.fast.denoise import FastDenoiseSession
from mindomni_rt.backends.torch.denoise import TorchDenoiseSession
from mindomni_rt.sampling.denoise import run_steps
from mindomni_rt.sampling.schedule import plan_steps, timesteps

STEPS = plan_steps(timesteps(9), 1, 1.0)
MOST = 2


class Device:
    """Finishes queued steps only when the host waits. It stands for a session too."""

    latents = velocity = np.zeros(1)

    def __init__(self) -> None:
        self.queued = self.done = 0

    def step(self, step: Any) -> None:
        self.queued += 1

    def mark(self) -> Callable[[], None]:
        at = self.queued

        def wait() -> None:
            self.done = max(self.done, at)

        return wait

    def ahead(self, time: float) -> Any:
        return self.latents


def test_a_reported_step_is_nearly_done() -> None:
    device, behind = Device(), []
    for state in run_steps(device, STEPS):
        behind.append(state.step - device.done)
    assert len(behind) == 9 and max(behind) == MOST


@pytest.mark.parametrize("at", [1, 2, 5])
def test_cancelling_queues_nothing_more(at: int) -> None:
    device, cancel = Device(), threading.Event()
    with pytest.raises(GenerationCancelled):
        for state in run_steps(device, STEPS, cancel):
            if state.step == at:
                cancel.set()
    assert device.queued == at and device.queued - device.done <= MOST


def test_every_session_waits_for_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch by an event of the device that the session is on, TensorRT by one of its stream."""
    log: list[Any] = []

    class Event:
        def record(self) -> None:
            log.append("recorded")

        def synchronize(self) -> None:
            log.append("waited")

    class Current:
        def __init__(self, index: int) -> None:
            log.append(index)

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", Current)
    runner = object.__new__(TensorRTRunner)
    runner._stream = SimpleNamespace(record=lambda: Event.record(Event()) or SimpleNamespace(sync=Event().synchronize))
    compiled = object.__new__(CompiledDenoiseSession)
    compiled._graphs = SimpleNamespace(runner=runner)  # type: ignore[assignment]
    fast = object.__new__(FastDenoiseSession)
    fast.device = "cuda:1"
    plain = object.__new__(TorchDenoiseSession)
    plain.latents = SimpleNamespace(device=torch.device("cuda", 1))  # type: ignore[assignment]
    for session, expected in ((fast, [1]), (plain, [1]), (compiled, [])):
        log.clear()
        wait = session.mark()  # type: ignore[attr-defined]
        assert log == [*expected, "recorded"]
        wait()
        assert log[-1] == "waited"
    plain.latents = torch.zeros(1)
    log.clear()
    plain.mark()()
    assert not log
