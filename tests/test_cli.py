"""The command line as a user meets it: output, exit codes, one line for each mistake."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import PARITY
from PIL import Image

from mindomni_rt.cli import main
from mindomni_rt.inputs.images import read_settings

MODEL = ["--model", str(PARITY), "--device", "cpu"]
SMALL = ["--size", "48x32", "--steps", "2", "--max-new-tokens", "6", "--seed", "5"]
SCENE = str(PARITY / "cases" / "scene.png")


def test_generate_writes_a_png_with_its_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a.png"
    assert main(["generate", "two cats", *MODEL, *SMALL, "--out", str(out)]) == 0
    assert Image.open(out).size == (48, 32)
    settings = read_settings(out)
    assert settings["prompt"] == "two cats" and settings["seed"] == 5 and settings["width"] == 48
    shown = capsys.readouterr()
    assert str(out) in shown.out and "seed 5" in shown.out
    assert settings["text"].strip() in shown.out
    assert "painting" in shown.err


def test_several_images_can_each_be_made_again(tmp_path: Path) -> None:
    out = tmp_path / "a.png"
    assert main(["generate", "x", *MODEL, *SMALL, "--num-images", "2", "--out", str(out), "-q"]) == 0
    seed = read_settings(tmp_path / "a-1.png")["seed"]
    assert seed == 6
    again = ["generate", "x", *MODEL, *SMALL[:-1], str(seed), "--out", str(out), "-q"]
    assert main(again) == 0
    difference = [
        abs(a - b) for a, b in zip(Image.open(out).tobytes(), Image.open(tmp_path / "a-1.png").tobytes(), strict=True)
    ]
    assert max(difference) <= 1


def test_json_is_one_object_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a.png"
    assert main(["generate", "x", *MODEL, *SMALL, "--out", str(out), "--json", "--no-think"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["files"] == [str(out)] and data["seed"] == 5 and data["timings"]["total"] > 0
    assert main(["understand", "what?", *MODEL, "--image", SCENE, "--max-new-tokens", "4", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) >= {"text", "token_ids"}
    assert main(["info", *MODEL, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"]["vae"] > 0


def test_edit_understand_info(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a.png"
    assert main(["edit", SCENE, "make it red", *MODEL, *SMALL, "--out", str(out)]) == 0 and out.exists()
    assert main(["understand", "what?", *MODEL, "--image", SCENE, "--max-new-tokens", "4"]) == 0
    assert main(["info", *MODEL]) == 0
    assert "language" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["paint"],
        ["generate", "x"],
        ["generate", "", *MODEL],
        ["generate", "x", *MODEL, "--size", "100x100"],
        ["generate", "x", *MODEL, "--size", "big"],
        ["generate", "x", *MODEL, "--size", "-16x16"],
        ["generate", "x", *MODEL, "--steps", "0"],
        ["generate", "x", *MODEL, "--steps", "many"],
        ["generate", "x", *MODEL, "--guidance", "nan"],
        ["generate", "x", *MODEL, "--out", "nowhere/at/all.png"],
        ["generate", "x", *MODEL, "--out", "picture.jpg"],
        ["generate", "x", *MODEL, *SMALL, "--image", "missing.png"],
        ["generate", "x", "--model", "missing/at/all"],
        ["generate", "x", *MODEL[:2], "--device", "tpu"],
        ["generate", "word " * 2000, *MODEL, *SMALL],
        ["understand", " ", *MODEL],
        ["info", "--model", "tests"],
    ],
)
def test_mistakes_take_one_line_and_exit_code_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    shown = capsys.readouterr()
    assert code == 2
    assert len(shown.err.strip().splitlines()) == 1 and shown.err.startswith("mindomni")
    assert "Traceback" not in shown.err and not list(tmp_path.iterdir())


def test_a_full_disk_loses_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A write that fails is an error, the old file stays, no half file is left."""
    out = tmp_path / "a.png"
    out.write_bytes(b"old")
    from mindomni_rt.inputs import images

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images.Image.Image, "save", full)
        assert main(["generate", "x", *MODEL, *SMALL, "--out", str(out)]) == 2
    assert "No space left" in capsys.readouterr().err
    assert out.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_demo_thinks_right_and_paints_what_it_thought(tmp_path: Path) -> None:
    """From the bundle in assets, with no torch to be had: three yellow circles on the diagonal."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    script = "import sys; sys.modules['torch'] = None; from mindomni_rt.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", script, "demo", "--out", "out/demo.png"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=True,
    )  # fmt: skip
    assert "1 + 2 = 3. a lemon is yellow. a wheel is a circle." in done.stdout
    assert "three yellow circles" in done.stdout
    pixels = np.asarray(Image.open(tmp_path / "out" / "demo.png"), np.int64)
    assert pixels.shape == (96, 96, 3)
    centres = pixels[16::32, 16::32]
    yellow = (centres[..., 0] > 180) & (centres[..., 1] > 150) & (centres[..., 2] < 100)
    assert yellow.tolist() == [[True, False, False], [False, True, False], [False, False, True]]


def test_demo_without_the_small_model_says_that_it_is_random(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mindomni_rt.cli.DEMO_MODELS", ())
    assert main(["demo", "--out", str(tmp_path / "demo.png")]) == 0
    assert "RANDOM" in capsys.readouterr().out and (tmp_path / "demo.png").exists()


def test_interrupting_leaves_no_traceback_and_no_file(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = ["generate", "x", *MODEL, "--size", "1024x1024", "--steps", "1000", "--out", "a.png"]
    process = subprocess.Popen(
        [sys.executable, "-m", "mindomni_rt", *command],
        cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # A shell's background jobs ignore Ctrl-C, and their children with them; this one must not.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.read(1)  # the first piece of text: it is running
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err and not list(tmp_path.iterdir())


def test_closed_output_is_no_error(tmp_path: Path) -> None:
    if shutil.which("head") is None:
        pytest.skip("needs the command head")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    script = f"{sys.executable} -m mindomni_rt info --model {PARITY} --json | head -c 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", script], env=environment, capture_output=True, text=True)
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
