"""`mindomni batch`: a file of prompts to a folder of pictures."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import mindomni_rt
from mindomni_rt.cli import main
from mindomni_rt.serving.painter import Painter
from serving.serving_tools import BUNDLE, PROMPT, SMALL, png, same

ROOT = Path(__file__).parents[2]
DEFAULTS = [f"--default={name}={value}" for name, value in SMALL.items()]
LINES: list[dict[str, Any]] = [
    {"id": "lemons", "prompt": PROMPT, "seed": 7},
    {"prompt": PROMPT},
    {"id": "two", "prompt": PROMPT, "num_images": 2, "size": "32x48", "think": False},
    {"id": "red", "prompt": "make it red", "image": "picture.png", "think": False, "size": "48x32"},
    {"id": "what", "task": "understand", "prompt": "what is this?", "image": "picture.png", "max_new_tokens": 6},
]


def write(folder: Path, lines: list[Any]) -> Path:
    (folder / "picture.png").write_bytes(png())
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n\n" for line in lines), encoding="utf-8")
    return path


def batch(path: Path, out: Path, *options: str) -> int:
    return main(["batch", str(path), "--out", str(out), "--model", BUNDLE, "--device", "cpu", *DEFAULTS, *options])


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def test_results_stand_beside_their_ids(tmp_path: Path, pipe: mindomni_rt.Pipeline) -> None:
    out = tmp_path / "new" / "out"
    assert batch(write(tmp_path, LINES), out) == 0
    names = {"lemons.png", "lemons.json", "000003.png", "000003.json", "two-0.png", "two-1.png", "two.json"}
    names |= {"red.png", "red.json", "what.json"}
    assert {p.name for p in out.iterdir()} == names
    alone = pipe.generate(PROMPT, **{**SMALL, "seed": 7})
    about = json.loads((out / "lemons.json").read_text())
    assert same(Image.open(out / "lemons.png"), alone.images[0])
    assert about["thinking"] == alone.thinking and about["answer"] == alone.answer and about["seed"] == 7
    assert mindomni_rt.read_settings(out / "lemons.png")["prompt"] == PROMPT
    assert (
        json.loads((out / "what.json").read_text())["text"]
        == pipe.understand("what is this?", image=png(), max_new_tokens=6).text
    )
    # A line without a seed has one of its own, the same each time, from which it can be made again.
    seed = json.loads((out / "000003.json").read_text())["seed"]
    assert same(Image.open(out / "000003.png"), pipe.generate(PROMPT, **{**SMALL, "seed": seed}).images[0])


def test_what_is_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, path = tmp_path / "out", write(tmp_path, LINES)
    ran: list[str] = []
    run = Painter._result

    def counted(self: Painter, task: Any) -> Any:
        ran.append(task.id)
        if task.id == "red" and len(ran) == 4:
            raise KeyboardInterrupt
        return run(self, task)

    monkeypatch.setattr(Painter, "_result", counted)
    assert batch(path, out) == 130
    assert ran == ["lemons", "000003", "two", "red"] and not (out / "red.json").exists()
    ran.clear()
    assert batch(path, out) == 0 and ran == ["red", "what"]
    before = digests(out)
    ran.clear()
    (out / "two-1.png").unlink()  # a file that is missing, a line that changed, a picture that changed
    path = write(tmp_path, [{**LINES[0], "seed": 8}, *LINES[1:]])
    assert batch(path, out) == 0 and ran == ["lemons", "two"]
    after = digests(out)
    assert {n for n in after if after[n] != before[n]} == {"lemons.png", "lemons.json"}
    (tmp_path / "picture.png").write_bytes(png(seed=1))
    ran.clear()
    assert batch(path, out, "-q") == 0 and ran == ["red", "what"]


def test_a_line_that_fails_is_reported_and_tried_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = write(tmp_path, [LINES[3], LINES[0]]), tmp_path / "out"
    (tmp_path / "picture.png").write_bytes(b"no picture")
    assert batch(path, out) == 1
    assert "cannot be read" in json.loads((out / "red.json").read_text())["error"]
    assert (out / "lemons.png").exists() and "1 failed" in capsys.readouterr().err
    (tmp_path / "picture.png").write_bytes(png())
    assert batch(path, out, "-q") == 0 and "error" not in json.loads((out / "red.json").read_text())


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "x", "guidance_scale": null}', "line 1: guidance_scale = None: expected a number; leave it out"),
        ('{"prompt": ""}', "line 1: the prompt is empty"),
        ("{", "line 1:"),
        ("3", "line 1: expected an object"),
        ('{"prompt": "x", "id": "../x"}', "line 1: id"),
        ('{"prompt": "x", "id": ".x"}', "line 1: id"),
        ('{"prompt": "x", "id": "a/b"}', "line 1: id"),
        ('{"prompt": "x", "id": "a"}\n{"prompt": "x", "id": "a"}', "line 2: id 'a' is there twice"),
        ('{"prompt": "x", "sed": 1}', "did you mean seed"),
        ('{"prompt": "x", "height": 7}', "height = 7"),
        ('{"prompt": "x", "task": "paint"}', "expected one of generate, understand"),
        ('{"prompt": "x", "image": "missing.png"}', "No such file"),
        ('{"prompt": "x", "latents": []}', "no option 'latents'"),
        ("", "no line"),
    ],
)
def test_mistakes_are_found_before_anything_is_painted(
    tmp_path: Path, line: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(line, encoding="utf-8")
    assert batch(path, tmp_path / "out") == 2
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_other_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, LINES)
    assert batch(tmp_path / "missing.jsonl", tmp_path) == 2
    assert batch(path, tmp_path / "out", "--replicas", "0") == 2
    assert batch(path, path) == 2
    assert batch(path, tmp_path / "out", "--default", "seed=3") == 2
    assert batch(path, tmp_path / "out", "--default", "height=7") == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 5


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_two_replicas_give_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="replicas need the extra ray")
    lines = LINES + [{"id": f"more-{i}", "prompt": PROMPT, "think": False} for i in range(7)]
    path = write(tmp_path, lines)
    assert batch(path, tmp_path / "one", "-q") == 0
    (tmp_path / "two").mkdir()
    for name in ("lemons.png", "lemons.json"):  # a run that was interrupted
        (tmp_path / "two" / name).write_bytes((tmp_path / "one" / name).read_bytes())
    assert batch(path, tmp_path / "two", "--replicas", "2", "-q") == 0
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_a_killed_replica_changes_nothing(tmp_path: Path) -> None:
    """Ray starts another and hands its lines out again."""
    pytest.importorskip("ray", reason="replicas need the extra ray")
    psutil = pytest.importorskip("psutil", reason="finding a replica's process needs psutil of the dev extra")
    lines = [{"prompt": PROMPT, "think": False, "num_inference_steps": 60, "size": "96x96"} for _ in range(60)]
    path, out = write(tmp_path, lines), tmp_path / "out"
    command = [sys.executable, "-m", "mindomni_rt", "batch", str(path), "--out", str(out), "--model", BUNDLE]
    command += ["--device", "cpu", *DEFAULTS, "--replicas", "2", "-q"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, cwd=ROOT)
    try:
        while len(list(out.glob("*.json"))) < 3:
            assert process.poll() is None
            time.sleep(0.05)
        workers = [
            child
            for child in psutil.Process(process.pid).children(recursive=True)
            if any("MapWorker" in part for part in child.cmdline())
        ]
        assert len(workers) == 2 and process.poll() is None
        workers[0].kill()
        assert process.wait(200) == 0
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(30)
    assert len(list(out.glob("*.json"))) == len(list(out.glob("*.png"))) == 60
    assert batch(path, tmp_path / "one", "-q") == 0
    assert digests(out) == digests(tmp_path / "one")
