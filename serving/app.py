"""The application: routes, and errors in OpenAI's form. `mindomni serve` and Ray run the same one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response

from mindomni_rt.errors import MindOmniError

from . import chat, images
from .engine import Engine
from .errors import INVALID, ApiError
from .following import ClientGone, reported
from .gate import GONE, Gate, outcome
from .model import Model
from .pictures import Pictures
from .server_state import ServerState, state_of
from .settings import Settings

router = APIRouter()


def create_app(engine: Engine, settings: Settings, model: Model) -> FastAPI:
    """The application of one engine. Starting it starts the engine; at its end the engine has ended."""

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        try:
            yield
        finally:
            engine.stop()
            engine.join(timeout=10)

    # No pages of documentation: they load scripts from another site. /openapi.json has the same.
    app = FastAPI(title="mindomni-rt", lifespan=life, docs_url=None, redoc_url=None)
    app.state.server = ServerState(engine=engine, settings=settings, model=model, pictures=Pictures(settings))
    for part in (images.router, chat.router, router):
        app.include_router(part)
    for kind in (ApiError, MindOmniError, ClientGone, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, _failed)
    if settings.origins:
        headers = ["authorization", "content-type", "x-request-id"]
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.origins, allow_methods=["GET", "POST"], allow_headers=headers
        )
    app.add_middleware(Gate, settings=settings, metrics=engine.metrics)
    return app


# The framework's own refusals: 400 is a body that does not parse, also by its depth or its digits.
_CODES = {400: "invalid_body", 404: "not_found", 405: "method_not_allowed"}


async def _failed(http: HttpRequest, error: Exception) -> Response:
    """Any error of a route as an answer."""
    if isinstance(error, ClientGone):
        outcome(http.scope, "cancelled")
        return Response(status_code=GONE)
    if isinstance(error, RequestValidationError):
        message = "the request's body is not a JSON object; send one, with content-type: application/json"
        error = ApiError(400, message, code="invalid_body")
    elif isinstance(error, HTTPException):
        words = {404: "there is no such route", 405: "this route has another method"}
        message = words.get(error.status_code, str(error.detail))
        error = ApiError(
            error.status_code,
            message,
            code=_CODES.get(error.status_code, "invalid_request"),
            type=INVALID,
            headers=error.headers,
        )
    found = reported(error, http)
    outcome(http.scope, found.code)
    return JSONResponse(found.body(), status_code=found.status, headers=found.headers)


@router.get("/v1/models")
async def models(http: HttpRequest) -> dict[str, Any]:
    """The one model, under each of its names."""
    state = state_of(http)
    return {"object": "list", "data": [_model(state, name) for name in state.names]}


@router.get("/v1/models/{name:path}")
async def model(name: str, http: HttpRequest) -> dict[str, Any]:
    """The model by a name."""
    state = state_of(http)
    state.require_model(name)
    return _model(state, name)


def _model(state: ServerState, name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": state.began, "owned_by": "mindomni-rt"}


@router.get("/health")
async def health(http: HttpRequest) -> JSONResponse:
    """200 as long as starting the server again would help nothing."""
    state = state_of(http).engine.state
    return JSONResponse({"status": state}, status_code=503 if state == "failed" else 200)


@router.get("/ready")
async def ready(http: HttpRequest) -> JSONResponse:
    """200 while requests are taken."""
    state = state_of(http).engine.state
    return JSONResponse({"status": state}, status_code=200 if state == "ready" else 503)


@router.get("/metrics")
async def metrics(http: HttpRequest) -> PlainTextResponse:
    """For Prometheus."""
    text = state_of(http).engine.metrics.text()
    return PlainTextResponse(text, media_type="text/plain; version=0.0.4")
