"""Error texts that tutorials print are those that a user sees."""

from __future__ import annotations

from pathlib import Path

import pytest

from mindomni_rt import BadRequestError
from mindomni_rt.request import Request

TUTORIALS = Path(__file__).parents[2] / "docs" / "tutorials"


def test_a_wrong_size() -> None:
    with pytest.raises(BadRequestError) as error:
        Request(prompt="a cat", height=100)
    assert f"print(error)  # {error.value}\n" in (TUTORIALS / "embed.md").read_text(encoding="utf-8")
