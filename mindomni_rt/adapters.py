"""LoRA adapters of a loaded model: added, scaled and taken away between requests."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from .backends.base import ADAPTERS, Backend
from .checks import shown
from .errors import BadCheckpointError, BadRequestError
from .files import why


class AdapterCalls(ABC):
    """The part of `Pipeline` that changes the weights. The backend holds the adapters."""

    backend: Backend

    @abstractmethod
    def _changed_weights(self) -> AbstractContextManager[None]:
        """Waits for the running request; afterwards nothing is kept that other weights made."""

    def load_adapter(self, folder: str | Path, *, scale: float = 1.0, name: str | None = None) -> str:
        """Adds a LoRA adapter: a folder as peft and our training write it. Returns its name.

        Sums are computed in float32 and rounded once to the type of the weights. name: the folder's by default.
        Several adapters add up. Raises BadCheckpointError for one that does not fit, BadRequestError where the backend
        cannot: adapters need a checkpoint on the torch backend without the fast path.
        """
        if not isinstance(folder, (str, Path)):
            raise BadRequestError(f"adapter {shown(folder)}: expected a folder")
        path = Path(folder)
        try:
            name = path.resolve().name if name is None else name
            found = path.is_dir()
        except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL inside, a loop of links
            raise BadCheckpointError(f"adapter {shown(str(path), 200)}: {why(error)}") from error
        if not found:
            raise BadCheckpointError(f"adapter {shown(str(path), 200)}: no such folder")
        with self._changed_weights():
            self._held().load(path, scale, name)
        return name

    def set_adapter_scale(self, name: str, scale: float) -> None:
        """Changes how much of an adapter is added; 0 is none of it. Raises BadRequestError."""
        with self._changed_weights():
            self._held().set_scale(name, scale)

    def unload_adapter(self, name: str) -> None:
        """Takes an adapter away: the weights have the bits that they had before. Raises BadRequestError."""
        with self._changed_weights():
            self._held().unload(name)

    @property
    def adapters(self) -> dict[str, float]:
        """Loaded adapters and their scales."""
        return self._held().scales() if ADAPTERS in self.backend.capabilities else {}

    def _held(self) -> Any:
        if ADAPTERS not in self.backend.capabilities:
            kind = "the fast path" if hasattr(self.backend, "model") else f"backend {self.backend.name!r}"
            raise BadRequestError(
                f"{kind} takes no adapters: its weights are packed, compiled or rounded. Load the checkpoint with "
                "backend='torch', fast=False; or merge the adapter by training and build a bundle of the result"
            )
        return self.backend.adapters  # type: ignore[attr-defined]
