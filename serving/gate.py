"""What every request passes before a route sees it: an id, who may call, the body under its limits; and one log line.

Plain ASGI, so that nothing of a request is read before it is known to be welcome.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import re
import secrets
import time
from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError, api_error, bad
from .metrics import Metrics
from .protocol import CROWD
from .settings import Settings

logger = logging.getLogger(__name__)
_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_OPEN = ("/health", "/ready")  # for those who only ask whether the server lives
# Counted by name; all others are counted as one, since their names are the clients' own.
ROUTES = ("/v1/images/generations", "/v1/images/edits", "/v1/chat/completions", "/v1/models", "/metrics", *_OPEN)
GONE = 499  # nginx's number for a client that closed the connection first


class Gate:
    """Wraps an application."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics
        self._key = None if settings.api_key is None else _digest(settings.api_key.encode())
        self._held = 0  # bytes of all bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.monotonic()
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        name = given.decode() if _ID.fullmatch(given) else secrets.token_hex(12)
        state = scope.setdefault("state", {})
        ends: list[Callable[[], None]] = []
        state.update(request_id=name, arrived=began, outcome=None, ends=ends)
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *_ALWAYS, (b"x-request-id", name.encode())]
            await send(message)

        try:
            await self._pass(scope, headers, receive, answer)
        except ApiError as error:
            await _refuse(error, answer)
        finally:
            for end in ends:
                end()
            self._report(scope, name, status, time.monotonic() - began)

    def _report(self, scope: Scope, name: str, status: int, seconds: float) -> None:
        outcome = scope["state"]["outcome"] or (str(status) if status else "cancelled")
        route = scope["path"] if scope["path"] in ROUTES else "other"
        self._metrics.requests.labels(route, outcome).inc()
        self._metrics.request_seconds.labels(route).observe(seconds)
        level = logging.DEBUG if route in _OPEN or self._is_page(scope["path"]) else logging.INFO
        logger.log(level, "%s %s %s %.3f s", name, route, outcome, seconds)

    async def _pass(self, scope: Scope, headers: dict[bytes, bytes], receive: Receive, send: Send) -> None:
        if scope["path"] not in _OPEN:
            if scope["state"].get(CROWD, 0) > self._settings.max_connections:
                raise _busy("this server has as many connections as it takes; try again")
            self._check_page(headers)
            # A browser asks by OPTIONS before it sends a page's key; our own page has a login.
            if scope["method"] != "OPTIONS" and not self._is_open(scope["path"]):
                self._check_key(headers)
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        body = bytearray()
        try:
            await self._read(body, headers, receive)
            await self._app(scope, _replay(body, receive), send)
        finally:
            self._held -= len(body)

    def _is_page(self, path: str) -> bool:
        page = self._settings.page
        return page is not None and (path == page or path.startswith(f"{page}/"))

    def _is_open(self, path: str) -> bool:
        return self._is_page(path) or (self._settings.open_metrics and path == "/metrics")

    def _check_page(self, headers: dict[bytes, bytes]) -> None:
        host = headers.get(b"host", b"").decode("latin-1")
        hosts = self._settings.hosts
        if hosts and self._key is None and _hostname(host) not in hosts:
            raise ApiError(
                403,
                "this server has no API key and is only called by the names of this machine; see --api-key",
                code="host_not_allowed",
            )
        origin = headers.get(b"origin", b"").decode("latin-1")
        if origin and origin.partition("://")[2] != host and origin not in self._settings.origins:
            raise ApiError(
                403, "pages of other sites may not call this server; see --allow-origin", code="origin_not_allowed"
            )

    def _check_key(self, headers: dict[bytes, bytes]) -> None:
        if self._key is None:
            return
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(_digest(token.strip()), self._key):
            raise ApiError(
                401,
                "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                type="authentication_error",
                headers={"www-authenticate": "Bearer"},
            )

    async def _read(self, body: bytearray, headers: dict[bytes, bytes], receive: Receive) -> None:
        """The whole body, under the limits of size and time. What is in `body` at the end is counted as held."""
        declared = headers.get(b"content-length", b"0")
        if not declared.isdigit() or len(declared) > 15 or int(declared) > self._settings.max_body:
            raise self._too_large()
        try:
            async with asyncio.timeout(self._settings.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(GONE, "the client went away", code="cancelled")
                    piece = message.get("body", b"")
                    if len(body) + len(piece) > self._settings.max_body:
                        raise self._too_large()
                    if self._held + len(piece) > self._settings.max_body_total:
                        raise _busy("the bodies of open requests fill this server's memory; try again")
                    body += piece
                    self._held += len(piece)
                    if not message.get("more_body", False):
                        return
        except TimeoutError:
            raise ApiError(
                408,
                f"the request's body did not arrive within {self._settings.body_seconds:g} s",
                code="slow_body",
                headers={"connection": "close"},
            ) from None

    def _too_large(self) -> ApiError:
        error = bad(
            f"the request's body is larger than the {self._settings.max_body} bytes that this server takes",
            None,
            code="body_too_large",
            status=413,
        )
        error.headers["connection"] = "close"
        return error


def _busy(message: str) -> ApiError:
    headers = {"retry-after": "5", "connection": "close"}
    return ApiError(503, message, code="busy", type="server_error", headers=headers)


# Answers are data: a browser must not take one for a page, whatever a prompt put into it.
_ALWAYS = [(b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store")]


def _digest(key: bytes) -> bytes:
    """Equal lengths: a comparison in constant time would show the length of the key."""
    return hashlib.sha256(key).digest()


def _hostname(host: str) -> str:
    """A Host header without its port."""
    return host.lower() if host.endswith("]") else host.lower().rpartition(":")[0] or host.lower()


def _replay(body: bytearray, receive: Receive) -> Receive:
    """A body that was read already, then whatever the connection says next."""
    sent = False

    async def again() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": bytes(body), "more_body": False}

    return again


async def _refuse(error: ApiError, send: Send) -> None:
    data = json.dumps(error.body()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
    headers += [(k.encode(), v.encode()) for k, v in error.headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": data})


def at_end(scope: Scope, run: Callable[[], None]) -> None:
    """Calls a function when the request is over, however that comes."""
    scope["state"]["ends"].append(run)


def outcome(scope: Scope, what: str | None) -> None:
    """Says how a request ended, where its status cannot: an answer whose first bytes were sent already."""
    scope["state"]["outcome"] = what


def refusal(error: BaseException) -> tuple[int, dict[str, Any], dict[str, str]]:
    """An error's status, body and headers."""
    found = api_error(error)
    return found.status, found.body(), found.headers
