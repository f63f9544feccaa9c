"""A running server of the small model, and its client."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

import mindomni_rt
from serving.serving_tools import BUNDLE, Served, serving


@pytest.fixture(scope="session")
def served() -> Iterator[Served]:
    with serving() as found:
        yield found


@pytest.fixture(scope="session")
def client(served: Served) -> openai.OpenAI:
    return served.client()


@pytest.fixture(scope="session")
def pipe() -> mindomni_rt.Pipeline:
    """The same model in this process: what an answer must equal."""
    return mindomni_rt.load(BUNDLE, device="cpu")
