"""What the page's buttons do. A handler that runs a request gives its outputs as they come."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import wraps
from pathlib import Path
from typing import Any, Protocol

import gradio as gr

from mindomni_rt.errors import BadRequestError, GenerationCancelled, MindOmniError
from mindomni_rt.events import Event
from mindomni_rt.inputs.opening import open_image
from mindomni_rt.inputs.saving import read_settings
from mindomni_rt.request import Request, UnderstandRequest, edit_size

from ..errors import ApiError
from ..model import Model
from . import fields
from .sessions import Sessions
from .views import View, status, views


class Source(Protocol):
    """What runs requests: an `Engine`, or anything with its `stream`."""

    def stream(self, request: Any, *, cancel: Any = None) -> Iterator[Event]: ...


def _reporting(outputs: int) -> Callable[[Callable[..., Iterator[Any]]], Callable[..., Iterator[Any]]]:
    """For handlers whose first of so many outputs is the status: errors that the user can mend are shown there.

    Gradio's own way, an exception, would cover every output with the word "Error".
    """

    def decorate(handler: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        @wraps(handler)
        def reporting(*given: Any) -> Iterator[Any]:
            try:
                yield from handler(*given)
            except GenerationCancelled:
                yield (status("cancelled"), *[gr.skip()] * (outputs - 1))
            except (MindOmniError, ApiError) as error:
                _warn(error)
                yield (status(str(error), kind="alert"), *[gr.skip()] * (outputs - 1))

        return reporting

    return decorate


def _warn(error: Exception) -> None:
    gr.Warning(html.escape(str(error)))


class Handlers:
    """Of all open pages."""

    def __init__(self, source: Source, sessions: Sessions, model: Model) -> None:
        self._source, self._sessions, self._model = source, sessions, model

    @_reporting(8)
    def generate(self, page: gr.Request, history: list[str], *values: Any) -> Iterator[tuple[Any, ...]]:
        """Controls → status, thinking, answer, picture, gallery, history, selected picture, its settings."""
        yield from self._paint(fields.to_request(values), history, page)

    @_reporting(8)
    def edit(self, page: gr.Request, history: list[str], image: str | None, *values: Any) -> Iterator[tuple[Any, ...]]:
        """The same with a reference picture before the controls."""
        if image is None:
            raise BadRequestError("there is no picture to change; drop one, or choose one of this session")
        own, fixed = self._model.recommended(), self._model.defaults
        width, height = edit_size(*open_image(image).size, own)
        width, height = fixed.get("width", width), fixed.get("height", height)
        yield from self._paint(fields.to_request(values, image=image, width=width, height=height), history, page)

    def _paint(self, request: Request, history: list[str], page: gr.Request) -> Iterator[tuple[Any, ...]]:
        for view in self._views(fields.with_previews(request), page):
            picture = gr.skip() if view.preview is None else view.preview
            if view.result is None:
                yield (view.status, view.thinking, view.answer, picture, *[gr.skip()] * 4)
                continue
            paths = self._sessions.save(_name(page), view.result)
            history = [*reversed(paths), *history]
            found = (view.status, view.result.thinking, view.result.answer or view.result.text, paths[0])
            yield (*found, history, history, paths[0], read_settings(paths[0]))

    @_reporting(2)
    def understand(
        self, page: gr.Request, image: str | None, prompt: str, max_new_tokens: float, temperature: float
    ) -> Iterator[tuple[Any, ...]]:
        """A question, about a picture if there is one → status, answer."""
        request = UnderstandRequest(
            prompt=prompt, image=image, max_new_tokens=int(max_new_tokens), temperature=temperature
        )
        for view in self._views(request, page):
            yield view.status, view.answer if view.result is None else view.result.text.strip()

    def _views(self, request: Request | UnderstandRequest, page: gr.Request) -> Iterator[View]:
        with self._sessions.running(_name(page)) as cancel, closing(views(self._events(request, cancel))) as found:
            yield from found

    def _events(self, request: Request | UnderstandRequest, cancel: Any) -> Iterator[Event]:
        yield from self._source.stream(request, cancel=cancel)

    async def cancel(self, page: gr.Request) -> Any:
        """→ status. The request ends after its current token or step, and says so itself: as the last it says.

        Asynchronous, as no thread may be free while requests wait.
        """
        return gr.skip() if self._sessions.cancel(_name(page)) else status("nothing is running")

    def close(self, page: gr.Request) -> None:
        """The page was closed."""
        self._sessions.close(_name(page))

    def select(self, history: list[str], chosen: gr.SelectData) -> tuple[Any, ...]:
        """A picture of the history → picture, selected picture, its settings."""
        index = chosen.index if isinstance(chosen.index, int) else chosen.index[0]
        path = history[index]
        return path, path, read_settings(path)

    def restore(self, path: str | None) -> list[Any]:
        """A picture that carries settings → the open tab, status, and the values of all controls."""
        try:
            values = fields.from_settings(_settings_of(path))
        except MindOmniError as error:
            _warn(error)
            return [gr.skip(), status(str(error), kind="alert"), *[gr.skip()] * (len(fields.NAMES) + 1)]
        return [gr.Tabs(selected="generate"), status("the controls have the settings of the picture"), *values]

    def seed_of(self, path: str | None) -> Any:
        """The seed of a picture."""
        try:
            return str(_settings_of(path)["seed"])
        except MindOmniError as error:
            _warn(error)
            return gr.skip()


def _settings_of(path: str | None) -> dict[str, Any]:
    if path is None:
        raise BadRequestError("there is no picture yet whose settings could be used")
    try:
        return read_settings(path)
    except BadRequestError as error:  # by its name: where the file is here helps nobody
        raise BadRequestError(str(error).replace(path, Path(path).name)) from error


def _name(page: gr.Request) -> str:
    return page.session_hash or "page"
