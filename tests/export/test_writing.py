"""What a build may replace, and what it finds of builds that were killed."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import pytest

from mindomni_rt import BadBundleError
from mindomni_rt.bundle.claim import Claim
from mindomni_rt.bundle.manifest import MANIFEST
from mindomni_rt.bundle.writing import check_name, writing
from mindomni_rt.export.log import build_log

WHOLE = json.dumps({"format": 1, "files": {"vae.onnx": {}, "mllm/tokenizer.json": {}}})


def test_only_bundles_and_empty_folders_are_replaced(tmp_path: Path) -> None:
    def attempt(overwrite: bool) -> None:
        with writing(tmp_path / "out", overwrite) as folder:
            (folder / MANIFEST).write_text(WHOLE)

    (tmp_path / "out").mkdir()
    attempt(False)
    with pytest.raises(BadBundleError, match="--overwrite"):
        attempt(False)
    attempt(True)
    (tmp_path / "out" / MANIFEST).unlink()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(BadBundleError, match="will not be overwritten"):
        attempt(True)
    assert (tmp_path / "out" / "thesis.tex").exists()


def test_what_appears_during_a_build_is_not_replaced(tmp_path: Path) -> None:
    """Two builds of one name, or a user's folder of that name: the second to come is refused."""
    for overwrite in (False, True):
        with pytest.raises(BadBundleError, match=r"exists"), writing(tmp_path / "out", overwrite) as folder:
            (folder / MANIFEST).write_text(WHOLE)
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "thesis.tex").write_text("years of work")
        assert [p.name for p in tmp_path.iterdir()] == ["out"] and (tmp_path / "out" / "thesis.tex").exists()
        shutil.rmtree(tmp_path / "out")
    with pytest.raises(BadBundleError, match=r"exists; choose"), writing(tmp_path / "out") as first:
        (first / MANIFEST).write_text("first")
        with writing(tmp_path / "out") as second:
            (second / MANIFEST).write_text("second")
    assert (tmp_path / "out" / MANIFEST).read_text() == "second"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (MANIFEST, '{"name": "an app of the browser", "manifest_version": 3}', "is no bundle"),
        (MANIFEST, "{}", "is no bundle"),
        (MANIFEST, "[1, 2]", "is no bundle"),
        ("notes.txt", "mine", "holds notes.txt, which is not of the bundle"),
        ("mllm/notes.txt", "mine", "holds mllm/notes.txt"),
        ("README.md", "of the page where it is published", "holds README.md"),
        (".git/HEAD", "ref: refs/heads/main", r"holds \.git/HEAD"),
    ],
)
def test_overwriting_removes_nothing_that_a_build_did_not_write(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    out = tmp_path / "out"
    (out / "mllm").mkdir(parents=True)
    for each in (MANIFEST, "vae.onnx", "mllm/tokenizer.json", ".DS_Store"):
        (out / each).write_text(WHOLE)
    check_name(out, True)
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text(text)
    with pytest.raises(BadBundleError, match=f"{message}.*will not be overwritten"):
        check_name(out, True)
    with pytest.raises(BadBundleError, match=message), writing(out, True):
        raise AssertionError("the build began")
    assert (out / name).read_text() == text and (out / "vae.onnx").exists()


@pytest.mark.parametrize("inside", [[], [MANIFEST]])
def test_a_link_is_not_replaced(tmp_path: Path, inside: list[str]) -> None:
    """To an empty folder, to a bundle, to nothing: found before the work, and what it leads to stays."""
    place, out = tmp_path / "place", tmp_path / "out"
    out.symlink_to(place)
    for _ in range(2):
        for overwrite in (False, True):
            with pytest.raises(BadBundleError, match="out is a link"):
                check_name(out, overwrite)
            with pytest.raises(BadBundleError, match="out is a link"), writing(out, overwrite):
                raise AssertionError("the build began")
        assert out.is_symlink()
        place.mkdir(exist_ok=True)
        for name in inside:
            (place / name).write_text(WHOLE)


def test_what_a_killed_build_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    """Of the same name, and only what no living process holds: folders and logs."""
    script = """
import os, sys, time
from pathlib import Path
from mindomni_rt.bundle.writing import writing
from mindomni_rt.export.log import build_log
with build_log(Path("out")), writing("out"):
    print("running", flush=True)
    sys.stdin.read(1)
    os._exit(9)
"""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", script]
    more = dict(
        cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(root)}
    )
    killed = subprocess.Popen(command, **more)  # type: ignore[call-overload]
    assert killed.stdout.readline() == b"running\n"
    killed.communicate(b"x")
    left = set(tmp_path.iterdir())
    assert len(left) == 2 and killed.returncode == 9
    mine = {tmp_path / name for name in (".out.build.log.mine", ".out.partial-notes", ".out2.build.log.abcdefgh")}
    for path in mine:
        path.write_text("mine")
    os.mkfifo(tmp_path / ".out.build.log.abcdefgh")
    running = subprocess.Popen(command, **more)  # type: ignore[call-overload]
    assert running.stdout.readline() == b"running\n"
    held = set(tmp_path.iterdir()) - left - mine - {tmp_path / ".out.build.log.abcdefgh"}
    assert len(held) == 2 and not left & set(tmp_path.iterdir())
    with build_log(tmp_path / "out"), writing(tmp_path / "out") as folder:
        (folder / MANIFEST).write_text(WHOLE)
        assert held <= set(tmp_path.iterdir())
    assert held <= set(tmp_path.iterdir())
    running.communicate(b"x")
    with pytest.raises(BadBundleError, match="exists"), build_log(tmp_path / "out"), writing(tmp_path / "out"):
        pass
    names = {".out.build.log.abcdefgh", "out", "out.build.log", "out.build-failed.log", *(p.name for p in mine)}
    assert {p.name for p in tmp_path.iterdir()} - {p.name for p in held if p.is_dir()} == names
    assert all(path.read_text() == "mine" for path in mine)


def test_without_locks_nothing_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows."""
    monkeypatch.setattr("mindomni_rt.bundle.claim.fcntl", None)
    make = partial(tempfile.mkdtemp, prefix=".x-", dir=tmp_path)
    first, second = Claim(tmp_path, ".x-", make), Claim(tmp_path, ".x-", make)
    first.free()
    assert first.path.is_dir() and second.path.is_dir() and first.path != second.path


def test_a_log_that_cannot_take_its_name_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"), build_log(tmp_path / "out"):
        monkeypatch.setattr(os, "fsync", full)
    assert not list(tmp_path.iterdir())


def test_a_log_on_a_full_disk_says_nothing_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with build_log(tmp_path / "out"):
        handler = logging.getLogger("mindomni_rt").handlers[-1]
        assert isinstance(handler, logging.FileHandler)
        handler.stream = open("/dev/full", "w", buffering=1, encoding="utf-8")  # noqa: PTH123, SIM115
        logging.getLogger("mindomni_rt").warning("a line")
        logging.getLogger("mindomni_rt").handlers[-1].stream = open(os.devnull, "w", encoding="utf-8")  # type: ignore[attr-defined]  # noqa: PTH123, SIM115
    assert "Traceback" not in capsys.readouterr().err
