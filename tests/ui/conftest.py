"""The page of the small model, served in this process, and what its requests did."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import mindomni_rt
from mindomni_rt.demo import DEMO_MODELS
from mindomni_rt.events import Event, StepEvent

pytest.importorskip("gradio", reason="the page needs the ui extra")
pytest.importorskip("onnxruntime", reason="the small bundle needs the onnx extra")


@pytest.fixture(scope="session")
def pipe() -> mindomni_rt.Pipeline:
    return mindomni_rt.load(DEMO_MODELS[0][0], device="cpu")


@dataclass
class Recorder:
    """The `load` of an engine: the pipeline, which also tells how far each request came."""

    pipe: mindomni_rt.Pipeline
    steps: list[int] = field(default_factory=list)
    running: int = 0
    slow: threading.Event = field(default_factory=threading.Event)

    def stream(self, request: Any, *, cancel: Any = None) -> Iterator[Event]:
        self.running += 1
        self.steps.append(0)
        try:
            for event in self.pipe.stream(request, cancel=cancel):
                if isinstance(event, StepEvent):
                    self.steps[-1] = event.step
                if self.slow.is_set():
                    time.sleep(0.03)
                yield event
        finally:
            self.running -= 1

    def close(self) -> None: ...

    def wait_until_idle(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while self.running:
            assert time.monotonic() < end, "the request is still running"
            time.sleep(0.02)


@dataclass
class Served:
    address: str
    recorder: Recorder
    outside: list[Any]
    """Addresses beyond this machine that this process has asked for."""


@pytest.fixture(scope="session")
def served(pipe: mindomni_rt.Pipeline) -> Iterator[Served]:
    from mindomni_rt.serving.engine import Engine
    from mindomni_rt.serving.model import Model
    from mindomni_rt.serving.ui.page import build, launch

    recorder, outside = Recorder(pipe), []
    engine = Engine(lambda: recorder)  # type: ignore[arg-type, return-value]
    engine.start()
    with _noted(outside):
        page = build(engine, Model(path=str(DEMO_MODELS[0][0])))
        try:
            address = launch(page, host="127.0.0.1", port=0, block=False)
            yield Served(address.rstrip("/"), recorder, outside)
        finally:
            page.close(verbose=False)
            engine.stop()
            engine.join(timeout=10)


@contextlib.contextmanager
def _noted(outside: list[Any]) -> Iterator[None]:
    """Names that are looked up and addresses that are connected to, unless they are this machine's."""
    local = ("localhost", "127.0.0.1", "::1", "0.0.0.0", None, b"localhost", b"127.0.0.1")
    look_up, connect = socket.getaddrinfo, socket.socket.connect

    def noted_look_up(host: Any, *rest: Any, **more: Any) -> Any:
        if host not in local:
            outside.append(host)
        return look_up(host, *rest, **more)

    def noted_connect(self: socket.socket, address: Any) -> Any:
        if isinstance(address, tuple) and address[0] not in local:
            outside.append(address)
        return connect(self, address)

    patch = pytest.MonkeyPatch()
    patch.setattr(socket, "getaddrinfo", noted_look_up)
    patch.setattr(socket.socket, "connect", noted_connect)
    yield
    patch.undo()


@pytest.fixture(scope="session")
def screenshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that pytest keeps: `ls /tmp/pytest-of-*/pytest-current/screenshots*`."""
    return tmp_path_factory.mktemp("screenshots")
