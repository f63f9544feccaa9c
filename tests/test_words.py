"""Words: spelling by codespell, and no phrase of docs/words.txt, in documentation, docstrings, comments and messages.

`python tests/test_words.py` lists what the second test refuses.
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("mindomni_rt", "export", "kernels", "training", "benchmarks", "serving", "comfyui", "deploy")
FOLDERS += ("examples", "docs")
LINKS = tuple(ROOT / "mindomni_rt" / name for name in FOLDERS)
_FORMATTED = re.compile(r"r?fr?[\"']", re.IGNORECASE)
_STRINGS = (tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING))


def sources() -> list[Path]:
    """Files whose words users and developers read; each once, though some are reachable through links."""
    found = [*ROOT.glob("*.md"), *ROOT.glob("assets/*/*.md"), ROOT / "pyproject.toml"]
    for folder in FOLDERS:
        for suffix in ("*.py", "*.md", "*.toml", "*.sh"):
            found += (ROOT / folder).rglob(suffix)
    return sorted(p for p in found if not any(p.is_relative_to(link) for link in LINKS))


@cache
def banned() -> list[tuple[re.Pattern[str], str]]:
    lines = (ROOT / "docs" / "words.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split(" => ") for line in lines if line and not line.startswith("#")]
    return [(re.compile(phrase.replace(" ", r"\s+"), re.IGNORECASE), better) for phrase, better in pairs]


def prose(text: str, python: bool) -> Iterator[tuple[int, str]]:
    """Line number and words: all of a page, or the comments and strings of a module, comment lines joined."""
    if not python:
        yield 1, text
        return
    comment: list[str] = []
    began = last = 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            if comment and token.start[0] != last + 1:
                yield began, "\n".join(comment)
                comment = []
            began = began if comment else token.start[0]
            last = token.start[0]
            comment.append(token.string.lstrip("# "))
        elif token.type in _STRINGS:
            formatted = _FORMATTED.match(token.string)  # one token before Python 3.12, names of variables included
            yield token.start[0], re.sub(r"\{[^{}]*\}", "{}", token.string) if formatted else token.string
    if comment:
        yield began, "\n".join(comment)


def complaints(text: str, python: bool) -> list[str]:
    """`line: phrase -> what to write` for each banned phrase."""
    found = []
    for start, words in prose(text, python):
        for phrase, better in banned():
            for hit in phrase.finditer(words):
                line = start + words.count("\n", 0, hit.start())
                found.append(f"{line}: {' '.join(hit[0].split())!r}: write {better!r}")
    return found


def test_banned_phrases_are_found_in_words_and_not_in_names() -> None:
    module = (
        'stray = 1  # it strays\nx = f"a line is\\n{stray}"\n# the limits are\n# told here\n"""The library\'s."""\n'
    )
    assert sorted(c.split(": write")[0] for c in complaints(module, python=True)) == [
        "1: 'strays'",
        "3: 'are told'",
        '5: "The library\'s"',
    ]


def everywhere() -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{found}"
        for path in sources()
        for found in complaints(path.read_text(encoding="utf-8"), python=path.suffix == ".py")
    ]


def test_words_are_plain() -> None:
    assert not everywhere(), "\n".join(everywhere())


def test_spelling() -> None:
    pytest.importorskip("codespell_lib", reason="spelling needs the dev extra")
    command = [sys.executable, "-m", "codespell_lib", *(str(p) for p in sources())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


if __name__ == "__main__":
    sys.stdout.write("\n".join([*everywhere(), ""]))
