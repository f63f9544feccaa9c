"""HTTP connections that a slow client cannot hold open: uvicorn's protocol with two more timers."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from .settings import Settings

CROWD = "crowd"  # in a request's state: open connections or running requests, whichever are more


def patient(settings: Settings) -> type[H11Protocol]:
    """The protocol class for uvicorn's `http` option."""

    class Patient(H11Protocol):
        """Ends a connection whose client sends no whole head in time, or takes nothing of its answer."""

        head_timer: asyncio.TimerHandle | None = None
        write_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            app = self.app

            async def counted(scope: Any, receive: Any, send: Any) -> None:
                """Tells the application how full the server is: `Gate` refuses, and still answers whether it lives."""
                scope["state"][CROWD] = max(len(self.connections), len(self.tasks))
                await app(scope, receive, send)

            self.app = counted
            self._await_head()

        def handle_events(self) -> None:
            super().handle_events()
            if self.cycle is not None and not self.cycle.response_complete and self.head_timer is not None:
                self.head_timer.cancel()
                self.head_timer = None

        def on_response_complete(self) -> None:
            self._await_head()
            super().on_response_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            for timer in (self.head_timer, self.write_timer):
                if timer is not None:
                    timer.cancel()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            self.write_timer = self.loop.call_later(settings.write_seconds, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self.write_timer is not None:
                self.write_timer.cancel()
                self.write_timer = None

        def _await_head(self) -> None:
            if self.head_timer is not None:
                self.head_timer.cancel()
            self.head_timer = self.loop.call_later(settings.header_seconds, self.transport.abort)

    return Patient
