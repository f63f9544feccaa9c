"""What the routes of one server share."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.requests import Request as HttpRequest

from mindomni_rt.checks import shown

from .engine import Engine
from .errors import bad
from .model import Model
from .pictures import Pictures
from .settings import Settings

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ServerState:
    """The engine, and the rules under which it is used."""

    engine: Engine
    settings: Settings
    model: Model
    pictures: Pictures
    began: int = field(default_factory=lambda: int(time.time()))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the model; a path's last part, so that clients see no folder of this machine."""
        path = self.model.path
        return self.settings.names or (Path(path).name if Path(path).exists() else path,)

    def require_model(self, name: Any) -> None:
        """Raises ApiError for a model that is not served; none is the one that is."""
        if name is not None and name not in self.names:
            raise bad(
                f"model = {shown(name)}: this server has {', '.join(self.names)}", "model", "model_not_found", 404
            )

    def log_prompt(self, http: HttpRequest, prompt: str) -> None:
        """Where the log is to hold prompts, on one line."""
        if self.settings.log_prompts:
            logger.info("%s prompt %s", http.state.request_id, shown(prompt, 2000))


def state_of(http: HttpRequest) -> ServerState:
    """The server's, from one of its requests."""
    found: ServerState = http.app.state.server
    return found
