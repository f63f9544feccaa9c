"""A real server on this machine, with the small trained model behind it."""

from __future__ import annotations

import base64
import contextlib
import io
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import openai
import uvicorn
from PIL import Image

from mindomni_rt.demo import DEMO_MODELS
from mindomni_rt.serving.app import create_app
from mindomni_rt.serving.engine import Engine
from mindomni_rt.serving.model import Model
from mindomni_rt.serving.server import http_config
from mindomni_rt.serving.settings import Settings

BUNDLE = str(DEMO_MODELS[0][0])
SMALL: dict[str, Any] = dict(height=48, width=48, num_inference_steps=2, guidance_scale=1.0, max_new_tokens=48)
PROMPT = "draw (1 + 2) things of the colour of a lemon, shaped like a wheel"


@dataclass(frozen=True, kw_only=True)
class Served:
    """A running server."""

    url: str
    engine: Engine
    settings: Settings

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, **options})

    def asynchronous(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def http(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, **options)

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])


@contextlib.contextmanager
def serving(
    settings: Settings | None = None, load: Callable[[], Any] | None = None, defaults: dict[str, Any] | None = None
) -> Iterator[Served]:
    """Runs a server in a thread; waits until it takes requests, unless `load` is given."""
    settings = settings or Settings()
    model = Model(path=BUNDLE, options={"device": "cpu"}, defaults=SMALL if defaults is None else defaults)
    engine = Engine(load or model.load, max_queue=settings.max_queue, max_batch=settings.max_batch)
    server = uvicorn.Server(http_config(create_app(engine, settings, model), settings))
    listening = socket.create_server(("127.0.0.1", 0), backlog=1024)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        while not server.started:
            time.sleep(0.005)
        while load is None and engine.state == "loading":
            time.sleep(0.005)
        yield Served(url=f"http://127.0.0.1:{listening.getsockname()[1]}", engine=engine, settings=settings)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def decoded(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


def same(image: Image.Image, other: Image.Image) -> bool:
    return image.size == other.size and image.mode == other.mode and image.tobytes() == other.tobytes()


def png(width: int = 48, height: int = 32, seed: int = 0) -> bytes:
    """A picture's file."""
    values = np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return file.getvalue()


def data_uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()
