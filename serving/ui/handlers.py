"""What the page's buttons do. A handler that runs a request gives its outputs as they come."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Protocol

import gradio as gr

from mindomni_rt.errors import BadRequestError, GenerationCancelled, MindOmniError
from mindomni_rt.events import Event
from mindomni_rt.inputs.opening import open_image
from mindomni_rt.inputs.saving import read_settings
from mindomni_rt.request import Request, UnderstandRequest, edit_size

from ..errors import ApiError
from . import fields
from .sessions import Sessions
from .views import View, status, views


class Source(Protocol):
    """What runs requests: an `Engine`, or anything with its `stream`."""

    def stream(self, request: Any, *, cancel: Any = None) -> Iterator[Event]: ...


class Handlers:
    """Of all open pages. `fixed_size`: (width, height) of edited pictures, None for their own."""

    def __init__(self, source: Source, sessions: Sessions, fixed_size: tuple[int, int] | None) -> None:
        self._source, self._sessions, self._fixed_size = source, sessions, fixed_size

    def generate(self, page: gr.Request, history: list[str], *values: Any) -> Iterator[tuple[Any, ...]]:
        """Controls → status, thinking, answer, picture, gallery, history, selected picture, its settings."""
        with _told():
            yield from self._paint(fields.with_previews(fields.to_request(values)), history, page)

    def edit(self, page: gr.Request, history: list[str], image: str | None, *values: Any) -> Iterator[tuple[Any, ...]]:
        """The same with a reference picture before the controls."""
        with _told():
            if image is None:
                raise BadRequestError("there is no picture to change; drop one, or send one here from the first tab")
            width, height = self._fixed_size or edit_size(*open_image(image).size)
            more = {"image": image, "width": width, "height": height}
            yield from self._paint(fields.with_previews(fields.to_request(values, **more)), history, page)

    def _paint(self, request: Request, history: list[str], page: gr.Request) -> Iterator[tuple[Any, ...]]:
        for view in self._views(request, page):
            picture = gr.skip() if view.preview is None else view.preview
            if view.result is None:
                yield (view.status, view.thinking, view.answer, picture, *[gr.skip()] * 4)
                continue
            paths = self._sessions.save(_name(page), view.result)
            history = [*reversed(paths), *history]
            found = (view.status, view.result.thinking, view.result.answer or view.result.text, paths[0])
            yield (*found, history, history, paths[0], read_settings(paths[0]))

    def understand(
        self, page: gr.Request, image: str | None, prompt: str, max_new_tokens: float, temperature: float
    ) -> Iterator[tuple[Any, ...]]:
        """A question, about a picture if there is one → status, answer."""
        with _told():
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

    def cancel(self, page: gr.Request) -> str:
        """→ status. The request ends after its current token or step."""
        return status("cancelled" if self._sessions.cancel(_name(page)) else "nothing is running")

    def close(self, page: gr.Request) -> None:
        """The page was closed."""
        self._sessions.close(_name(page))

    def select(self, history: list[str], chosen: gr.SelectData) -> tuple[Any, ...]:
        """A picture of the history → picture, selected picture, its settings."""
        index = chosen.index if isinstance(chosen.index, int) else chosen.index[0]
        path = history[index]
        return path, path, read_settings(path)

    def restore(self, path: str | None) -> list[Any]:
        """A picture that carries settings → status, and the values of all controls."""
        with _told():
            if path is None:
                raise BadRequestError("there is no picture yet whose settings could be used")
            try:
                values = fields.from_settings(read_settings(path))
            except BadRequestError as error:  # by its name: where the file is here helps nobody
                raise BadRequestError(str(error).replace(path, Path(path).name)) from error
            return [status("the controls have the settings of the picture"), *values]

    def seed_of(self, path: str | None) -> str:
        """The seed of a picture."""
        with _told():
            if path is None:
                raise BadRequestError("there is no picture yet whose seed could be used")
            return str(read_settings(path)["seed"])


def _name(page: gr.Request) -> str:
    return page.session_hash or "page"


@contextmanager
def _told() -> Iterator[None]:
    """Errors that the user can mend, as the page shows them."""
    try:
        yield
    except GenerationCancelled:
        return
    except (MindOmniError, ApiError) as error:
        raise gr.Error(str(error), print_exception=False) from error
