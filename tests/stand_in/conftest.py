"""Fixtures of the stand-in."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .runs import Runs


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """Runs jobs on stand-ins, each once a session."""
    found = Runs(tmp_path_factory.mktemp("stand_in"))
    yield found
    found.close()
