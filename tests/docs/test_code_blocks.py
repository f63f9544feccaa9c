"""Code in README and docs runs as it is printed, page by page, in an empty folder: it needs no checkout.

Fenced blocks of `python` and `sh` run in order; those of a page share one folder and the Python blocks one namespace. A
block that cannot run says why in a comment on the line before: <!-- not run: needs a GPU -->.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(p for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*.md")])
_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=indent)```$", re.DOTALL | re.MULTILINE
)
_MARK = re.compile(r"<!-- not run: (.+?) -->\s*\Z")


@dataclass(frozen=True)
class Block:
    """A fenced block. reason: why it does not run, empty if it does."""

    language: str
    code: str
    line: int
    reason: str


def blocks(text: str) -> Iterator[Block]:
    for found in _FENCE.finditer(text):
        mark = _MARK.search(text[: found.start()])
        line = text.count("\n", 0, found.start()) + 1
        code = re.sub(f"^{found['indent']}", "", found["code"], flags=re.MULTILINE)
        yield Block(found["language"], code, line, mark[1] if mark else "")


def runnable(page: Path) -> list[Block]:
    return [b for b in blocks(page.read_text(encoding="utf-8")) if b.language in ("python", "sh")]


def test_marks_and_languages_are_read() -> None:
    text = "a\n```python\nx = 1\n```\n<!-- not run: slow -->\n```sh\nls\n```\n- b\n\n  ```\n  text\n  ```\n"
    assert list(blocks(text)) == [
        Block("python", "x = 1\n", 2, ""),
        Block("sh", "ls\n", 6, "slow"),
        Block("", "text\n", 11, ""),
    ]


@pytest.mark.parametrize("page", [p for p in PAGES if runnable(p)], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    todo = [block for block in runnable(page) if not block.reason]
    if not todo:
        pytest.skip("; ".join(sorted({block.reason for block in runnable(page)})))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{tmp_path}")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.syspath_prepend(str(tmp_path))
    names: dict[str, object] = {"__name__": page.stem}
    for block in todo:
        if block.language == "python":
            padding = "\n" * block.line  # so that a traceback names the page's own line
            exec(compile(padding + block.code, str(page), "exec"), names)
        else:
            done = subprocess.run(["bash", "-euo", "pipefail", "-c", block.code], capture_output=True, text=True)
            assert done.returncode == 0, f"{page}:{block.line}\n{block.code}\n{done.stdout}\n{done.stderr}"


_LINK = re.compile(r"(?<!\\)\]\((?!https?:|mailto:|#)([^)#\s]+)[^)]*\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_to_files(page: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    missing = [link for link in _LINK.findall(text) if not (page.parent / link).exists()]
    assert not missing
