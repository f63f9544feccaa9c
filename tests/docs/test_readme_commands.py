"""Every command that README prints runs, or is parsed by its own program and listed here with the reason.

The published model, a photo and a GPU are not at hand: the small model and a drawn photo stand in for the first two.
"""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mindomni_rt.cli import main

ROOT = Path(__file__).parents[2]
BUNDLE = ROOT / "assets" / "shapes-world-bundle"
STANDS_IN = {"EasonXiao-888/MindOmni": str(BUNDLE)}
# Command: the function that its program would call with the parsed options, and why it does not run here.
PARSED = {
    "mindomni export build": ("mindomni_rt.export.cli:_build", "TensorRT-RTX and 25 GB; tests/export builds engines"),
    "mindomni ui": ("mindomni_rt.serving.ui.command:run", "serves until it is stopped; tests/ui drives its page"),
    "mindomni serve": ("mindomni_rt.serving.server:run", "serves until it is stopped; tests/serving starts it"),
    "mindomni bench gpu": ("mindomni_rt.benchmarks.gpu.suite:run", "a GPU; test_gpu_suite.py runs it at toy size"),
    "mindomni bench peers": ("mindomni_rt.benchmarks.peers.command:run", "25 GB; test_peers.py runs it at toy size"),
}
# Run by another test, or not at all.
ELSEWHERE = {
    "pip install": "changes the environment; tests/test_wheel.py does the same in a clean one",
    "make demo": "makes an environment; the command in it is `mindomni demo`",
    "make test": "is this test run",
}
_PROGRAMS = ("mindomni ", "make ", "pip ", "python -m ")
_FENCE = re.compile(r"^```sh\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def printed(text: str) -> list[str]:
    """Commands of shell blocks and of inline code, comments taken off, in order."""
    block_lines = [line for block in _FENCE.findall(text) for line in block.splitlines()]
    lines = [re.split(r"\s#\s", line)[0].strip() for line in block_lines]
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return list(dict.fromkeys(c for c in [*lines, *inline] if c.startswith(_PROGRAMS)))


COMMANDS = printed((ROOT / "README.md").read_text(encoding="utf-8"))


def test_commands_are_found() -> None:
    text = "a `mindomni x --y` b `other`\n```sh\nmindomni z 'a'   # why\npip install .\n```\n"
    assert printed(text) == ["mindomni z 'a'", "pip install .", "mindomni x --y"]
    assert len(COMMANDS) > 8


def test_every_exception_is_still_printed() -> None:
    for known in (*PARSED, *ELSEWHERE):
        assert any(command.startswith(known) for command in COMMANDS), f"README no longer prints {known}"


@pytest.mark.parametrize("command", [c for c in COMMANDS if not c.startswith(tuple(ELSEWHERE))])
def test_it_runs(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Image.effect_mandelbrot((320, 240), (-2, -1, 1, 1), 20).convert("RGB").save("photo.jpg")
    program, *arguments = shlex.split(command)
    assert program == "mindomni"
    found = next((f for c, (f, _) in PARSED.items() if command.startswith(c)), None)
    asked: list[Any] = []
    if found is not None:
        module, _, name = found.partition(":")
        monkeypatch.setattr(importlib.import_module(module), name, lambda options: asked.append(options) or 0)
    else:
        arguments = [STANDS_IN.get(argument, argument) for argument in arguments]
    try:
        code = main(arguments)
    except SystemExit as end:
        code = int(end.code or 0)
    assert code == 0
    assert len(asked) == (found is not None)
    if "--out" in arguments and found is None:
        with Image.open(arguments[arguments.index("--out") + 1]) as image:
            assert image.size == (96, 96)


def test_make_has_the_targets() -> None:
    for command in (c for c in COMMANDS if c.startswith("make ")):
        done = subprocess.run(["make", "-n", *command.split()[1:]], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_the_installed_command_is_the_module() -> None:
    done = subprocess.run([sys.executable, "-m", "mindomni_rt", "--version"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip()
