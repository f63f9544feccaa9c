"""The API page names everything public, and the site builds without a warning."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mindomni_rt

ROOT = Path(__file__).parents[2]


def test_api_page_names_everything_public() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^::: (?:\w+\.)+(\w+)$", page, re.MULTILINE)) | set(re.findall(r"`(\w+)`", page))
    assert set(mindomni_rt.__all__) <= documented


def test_every_page_is_in_the_navigation() -> None:
    configuration = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").rglob("*.md")]
    assert [p for p in pages if p not in configuration and not p.startswith("ablations/")] == []


@pytest.mark.skipif(importlib.util.find_spec("mkdocstrings") is None, reason="the site needs the docs extra")
def test_site_builds_strictly(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "memory_budget" in (tmp_path / "api" / "index.html").read_text(encoding="utf-8")
