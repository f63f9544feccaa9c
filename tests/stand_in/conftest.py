"""Fixtures of the stand-in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from .runs import Runs


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, export_cache: Path) -> Iterator[Runs]:
    """Runs jobs on stand-ins, each once for all processes of a run of the tests."""
    found = Runs(tmp_path_factory.mktemp("stand_in"), export_cache.parent / "stand_in")
    yield found
    found.close()
