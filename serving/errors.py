"""Errors as OpenAI's clients read them: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mindomni_rt.errors import BadRequestError, MindOmniError, OutOfMemoryError

INVALID, SERVER = "invalid_request_error", "server_error"
# Where a field of `Request` has another name at the door.
_PARAMS = {"height": "size", "width": "size", "num_images": "n", "the prompt": "prompt", "latents": None}
_NAMED = re.compile(r"there is no option '(\w{1,64})'|(the prompt|[a-z][a-z_]*)(?: = | has \d+ | holds | is )")
_NO_RETRY = {"x-should-retry": "false"}  # openai's clients repeat a request that failed with 5xx, unless told this


class ApiError(Exception):
    """An answer that is an error. `headers` go with it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        type: str = INVALID,  # noqa: A002 the name in the answer
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.type, self.param = status, code, type, param
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """What is sent."""
        return {"error": {"message": str(self), "type": self.type, "param": self.param, "code": self.code}}


def bad(message: str, param: str | None, code: str = "invalid_value", status: int = 400) -> ApiError:
    """A mistake in a request, and the field that has it."""
    return ApiError(status, message, code=code, param=param)


def queue_full(waiting: int, seconds: int) -> ApiError:
    """429: as many requests wait as may."""
    return ApiError(
        429,
        f"{waiting} requests wait already; try again in about {seconds} s",
        code="queue_full",
        type="rate_limit_error",
        headers={"retry-after": str(seconds)},
    )


def loading() -> ApiError:
    """503: the model is being read."""
    return ApiError(
        503, "the model is being loaded; try again", code="loading", type=SERVER, headers={"retry-after": "5"}
    )


def stopping() -> ApiError:
    """503: the server finishes what it has."""
    return ApiError(
        503, "the server is being stopped; try again", code="stopping", type=SERVER, headers={"retry-after": "10"}
    )


def broken() -> ApiError:
    """503: the model does not work any more."""
    return ApiError(503, "the model failed; the server must be started again", code="failed", type=SERVER)


def too_late(seconds: float) -> ApiError:
    """504: the request's deadline has passed. It is not worth repeating by itself."""
    return ApiError(
        504,
        f"not done within the request's deadline of {seconds:g} s",
        code="deadline",
        type=SERVER,
        headers=_NO_RETRY,
    )


def api_error(error: BaseException) -> ApiError:
    """Any error as an answer. What is no MindOmniError says nothing but that it happened."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, BadRequestError):
        message = str(error)
        found = _NAMED.match(message)
        name = found[1] or found[2] if found else "image" if message.startswith("image ") else None
        return bad(message, _PARAMS.get(name, name) if name else None)
    if isinstance(error, OutOfMemoryError):
        return ApiError(400, str(error), code="out_of_memory", headers=_NO_RETRY)
    if isinstance(error, MindOmniError):
        return ApiError(500, str(error), code=type(error).__name__, type=SERVER, headers=_NO_RETRY)
    return ApiError(
        500,
        "an error inside the server; its log has it under this answer's X-Request-Id",
        code="internal",
        type=SERVER,
        headers=_NO_RETRY,
    )
