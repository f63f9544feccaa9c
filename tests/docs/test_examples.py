"""Every program in examples/ runs, as its first lines say, and the notebook's cells run in order."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SAYS = {
    "streaming": "five green squares",
    "preview_and_cancel": "cancelled; the pipeline is ready for the next request\nsix blue triangles",
    "async_app": "three yellow circles\nfive green squares",
    "graph": "reseeded: ran paint, decode\nmore-steps: ran connect, paint, decode",
    "custom_reward": "'reward/custom_reward:shows_one_colour'",
}
# Programs that are tested elsewhere, because they need more than this package.
ELSEWHERE = {"vlmevalkit_model"}


def run(name: str, folder: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / f"{name}.py")]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("name", sorted(SAYS))
def test_example_runs(name: str, tmp_path: Path) -> None:
    if name == "custom_reward":
        pytest.importorskip("peft", reason="stage 3 trains adapters of peft")
    assert SAYS[name] in run(name, tmp_path)
    for picture in tmp_path.glob("out/**/*.png"):
        with Image.open(picture) as image:
            assert image.size == (96, 96) or "rollouts" in picture.parts


def test_every_example_is_tested_and_listed() -> None:
    names = {path.stem for path in EXAMPLES.glob("*.py")} - ELSEWHERE
    assert names == set(SAYS)
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert all(f"`{name}.py`" in listed for name in names)


def test_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = EXAMPLES / "demo.ipynb"
    assert path.stat().st_size < 100_000, "keep the notebook's outputs small"
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), str(path), "exec"), names)
    assert "four blue circles" in capsys.readouterr().out
