"""An HTTP server in OpenAI's form: images, edits and chat, on one device, one request or batch at a time."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp

from mindomni_rt.errors import BadRequestError, MindOmniError, MissingExtraError
from mindomni_rt.events import Event
from mindomni_rt.request import Request, UnderstandRequest

from . import model
from .app import create_app
from .engine import Engine
from .listening import listen
from .protocol import patient
from .settings import KEY, Settings, options
from .translate import within

_LOCAL = ("localhost", "127.0.0.1", "[::1]", "::1")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, where to listen, who may call, and every limit of `Settings`."""
    model.add_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine alone)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument("--api-key", metavar="KEY", help=f"what clients must send; better in the environment, as {KEY}")
    parser.add_argument("--no-auth", action="store_true", help="listen beyond this machine without a key")
    parser.add_argument("--name", action="append", default=[], help="of the model as clients know it; repeatable")
    parser.add_argument("--allow-origin", action="append", default=[], metavar="URL", help="page that may call")
    parser.add_argument(
        "--fetch-host", action="append", default=[], metavar="HOST", help="from which pictures may be downloaded"
    )
    parser.add_argument("--ui", action="store_true", help="a page to try the model on, at /ui; see mindomni ui")
    parser.add_argument("--open-metrics", action="store_true", help="answer /metrics without a key")
    parser.add_argument("--log-prompts", action="store_true", help="write prompts into the log")
    parser.add_argument(
        "--replicas", metavar="N", help="copies of the model behind one address, one a GPU, by Ray Serve; or LEAST:MOST"
    )
    parser.add_argument("--ray-address", help="of a running Ray cluster; without it Ray runs on this machine")
    parser.add_argument("-q", "--quiet", action="store_true", help="log errors alone")
    for name, (kind, default) in options().items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default, help=f"(default: {default})")


def settings_of(given: argparse.Namespace) -> Settings:
    """Raises BadRequestError."""
    key = given.api_key or os.environ.get(KEY) or None
    local = given.host in _LOCAL
    if key is None and not local and not given.no_auth:
        raise BadRequestError(
            f"--host {given.host} is open to other machines: set {KEY} (or --api-key), or say --no-auth"
        )
    return Settings(
        api_key=key,
        names=tuple(given.name),
        hosts=_LOCAL if local else (),
        origins=tuple(given.allow_origin),
        fetch_hosts=tuple(given.fetch_host),
        page="/ui" if given.ui else None,
        open_metrics=given.open_metrics,
        log_prompts=given.log_prompts,
        **{name: getattr(given, name) for name in options()},
    )


class _Server(uvicorn.Server):
    """At the first signal no request is accepted any more, and accepted ones have their time. A second ends all."""

    def __init__(self, config: uvicorn.Config, engine: Engine, grace: float) -> None:
        super().__init__(config)
        self._engine, self._grace = engine, grace
        self.close_pages: Callable[[], None] = lambda: None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Of SIGINT and SIGTERM."""
        self.force_exit = self.should_exit
        self.should_exit = True
        self._engine.stop(0.0 if self.force_exit else self._grace)
        self.close_pages()


def run(given: argparse.Namespace) -> int:
    """Serves until a signal comes. Raises MindOmniError for what cannot be served, also after loading began."""
    logging.basicConfig(
        level=logging.ERROR if given.quiet else logging.INFO,
        format="%(asctime)s %(levelname)s %(message)s",
        stream=sys.stderr,
    )
    settings, chosen = settings_of(given), model.chosen(given)
    if given.replicas is not None or given.ray_address is not None:
        if settings.page is not None:
            raise BadRequestError("--ui has no replicas: leave --replicas out, or use mindomni ui")
        from . import ray_serve  # Ray takes seconds to import

        count = ray_serve.parse_replicas(given.replicas or "1")
        if given.ray_address is None:
            chosen.check()
        return ray_serve.run(
            chosen, settings, host=given.host, port=given.port, replicas=count, address=given.ray_address
        )
    chosen.check()
    server: _Server | None = None

    def failed() -> None:
        if server is not None:
            server.should_exit = True

    engine = Engine(
        chosen.load,
        max_queue=settings.max_queue,
        max_batch=settings.max_batch,
        probe=chosen.probe,
        on_failure=failed,
    )
    app = create_app(engine, settings, chosen)
    server = _Server(http_config(app, settings), engine, settings.grace)
    if settings.page is not None:
        server.close_pages = _mount_page(app, engine, settings, chosen)
    with listen(given.host, given.port) as listening:
        host, port = listening.getsockname()[:2]
        logging.getLogger(__name__).info(
            "%s at http://%s:%d/v1", app.state.server.names[0], f"[{host}]" if ":" in host else host, port
        )
        server.run(sockets=[listening])
    if isinstance(engine.failure, MindOmniError):
        raise engine.failure
    return int(engine.failure is not None)  # the log has it, without its text, which may hold what a client wrote


class _Limited:
    """The engine as the page uses it: under the limits of this server."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine, self._settings = engine, settings

    def stream(self, request: Request | UnderstandRequest, *, cancel: Any = None) -> Iterator[Event]:
        """Raises ApiError, and what `Engine.stream` raises."""
        return self._engine.stream(within(request, self._settings), cancel=cancel)


def _mount_page(app: FastAPI, engine: Engine, settings: Settings, chosen: model.Model) -> Callable[[], None]:
    try:
        from .ui.page import mount
    except ImportError as error:
        raise MissingExtraError(error.name or str(error), "ui") from error
    return mount(app, _Limited(engine, settings), chosen, path=settings.page or "", key=settings.api_key)


def http_config(app: ASGIApp, settings: Settings) -> uvicorn.Config:
    """How uvicorn is to treat connections."""
    return uvicorn.Config(
        app,
        http=patient(settings),
        ws="none",
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=int(settings.grace) + 10,
    )
