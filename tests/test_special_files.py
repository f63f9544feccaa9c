"""Every path that a user can pass, where it names no regular file: refused before it is read, in one line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from conftest import PARITY
from test_mistakes import one_line, run

from mindomni_rt.demo import DEMO_MODELS
from mindomni_rt.export.engines import _kept_report
from mindomni_rt.files import is_regular, read_bytes, read_text, replace_file, try_file
from mindomni_rt.outputs import check_target

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes"),
    pytest.mark.timeout(120),  # a pipe that is read waits for ever
]
BUNDLE, CHECKPOINT = str(DEMO_MODELS[0][0]), str(PARITY)
STREAM = ("pretrain", "--config", "shapes-pretrain", f"model={CHECKPOINT}", "out=o", "evaluate_every=0", "device=cpu")
# Command lines with FILE or FOLDER in place of the path.
FILES: list[tuple[str, tuple[str, ...]]] = [
    ("mindomni", ("edit", "FILE", "x", "--model", BUNDLE, "--steps", "1")),
    ("mindomni", ("understand", "x", "--model", BUNDLE, "--image", "FILE")),
    ("export", ("build", CHECKPOINT, "--target", "cpu", "--precision", "int8", "--calibration", "FILE", "--out", "o")),
    ("benchmarks", ("quality", "geneval", CHECKPOINT, "--prompts", "FILE", "--out", "q")),
    ("benchmarks", ("quality", "dpg", CHECKPOINT, "--prompts", "FILE", "--out", "q")),
    ("benchmarks", ("compare", "FILE", "FILE")),
    ("benchmarks", ("check", "FILE")),
    ("serving", ("batch", "FILE", "--model", BUNDLE, "--out", "b")),
    ("training", ("plot", "--stages", "FILE", "--out", "x.png")),
    ("training", ("plot", "--study", "FILE", "--out", "x")),
    ("training", ("evaluate", CHECKPOINT, "--against", "FILE")),
    ("training", ("pack", CHECKPOINT, "p", "--record", "sft=FILE")),
    ("training", ("prior", "--config", "FILE")),
    ("training", ("dry-run", "--config", "FILE")),
    ("training", (*STREAM, "data.source=jsonl", "data.paths='FILE'")),
    ("training", (*STREAM, "data.source=jsonl", "data.paths='FILE.yaml'")),
    ("training", (*STREAM, "data.source=webdataset", "data.paths='FILE'")),
]
FOLDERS: list[tuple[str, tuple[str, ...]]] = [
    ("mindomni", ("generate", "x", "--model", "FOLDER")),
    ("mindomni", ("info", "--model", "FOLDER")),
    ("mindomni", ("generate", "x", "--model", CHECKPOINT, "--device", "cpu", "--adapter", "FOLDER")),
    ("export", ("build", "FOLDER", "--target", "cpu", "--out", "o")),
    ("export", ("build", CHECKPOINT, "--target", "cpu", "--out", "FOLDER")),
    ("export", ("verify", "FOLDER")),
    ("export", ("verify", BUNDLE, "--against", "FOLDER")),
    ("export", ("inspect", "FOLDER")),
    ("export", ("plan", "--device", "rtx4060", "--checkpoint", "FOLDER")),
    ("export", ("products", "--folder", "FOLDER")),
    ("export", ("rehearse", "vae", "--target", "sm_89", "--folder", "FOLDER")),
    ("benchmarks", ("latency", "FOLDER")),
    ("benchmarks", ("load", "FOLDER")),
    ("training", ("evaluate", "FOLDER")),
    ("training", ("pack", CHECKPOINT, "p", "--run", "FOLDER")),
    ("training", ("new", "n", "--vae", "FOLDER")),
]


def _id(value: str | tuple[str, ...]) -> str:
    return value if isinstance(value, str) else "-".join(part for part in value if "/" not in part)[:40]


@pytest.fixture(autouse=True)
def special(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names in the current folder: a pipe, a device that never ends, a folder, 300 letters."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    os.mkfifo("pipe")
    os.mkfifo("pipe.yaml")
    Path("zero.yaml").symlink_to("/dev/zero")
    Path("zero").symlink_to("/dev/zero")
    Path("folder").mkdir()
    Path("folder.yaml").mkdir()
    return ["pipe", "zero", "folder", "x" * 300]


@pytest.mark.parametrize(("program", "arguments"), FILES, ids=_id)
def test_in_place_of_a_file(
    program: str, arguments: tuple[str, ...], special: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for name in special:
        code = run(program, [part.replace("FILE", name) for part in arguments])
        error = capsys.readouterr().err
        assert code == 2 and error.count("\n") == 1, (name, error)
        assert "Errno" not in error and "Traceback" not in error and len(error) < 1000, (name, error)


@pytest.mark.parametrize(("program", "arguments"), FOLDERS, ids=_id)
def test_in_place_of_a_folder(
    program: str, arguments: tuple[str, ...], special: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for name in special:
        if name != "folder" or not {"--folder", "--out"} & set(arguments):  # there it is a good one
            code = run(program, [part.replace("FOLDER", name) for part in arguments])
            error = capsys.readouterr().err
            assert code == 2 and error.count("\n") == 1, (name, error)
            assert "Errno" not in error and "Traceback" not in error and len(error) < 1000, (name, error)


def test_files_inside_of_folders(special: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("metrics.jsonl", "runs.jsonl", "world_vae.safetensors", "adapter_config.json"):
        os.mkfifo(Path("folder", name))
    load = ["--model", CHECKPOINT, "--device", "cpu"]
    for program, arguments, named in (
        ("training", ["pack", CHECKPOINT, "p", "--run", "folder"], "no log of a run: is a pipe"),
        ("training", ["new", "n", "--vae", "folder"], "not the world's autoencoder (is a pipe"),
        ("training", ["plot", "folder", "--out", "x.png"], "metrics.jsonl"),
        ("mindomni", ["generate", "x", *load, "--adapter", "folder"], "adapter_config.json: is a pipe"),
    ):
        one_line(run(program, arguments), capsys, named)


def test_what_is_read_of_special_files(special: list[str]) -> None:
    for name in (*special, "a\0b", "missing"):
        for read in (lambda path: read_bytes(path, 9), read_text):
            with pytest.raises(OSError, match=r"regular|folder|too long|no file can have|No such"):
                read(Path(name))
        assert not is_regular(Path(name))
    Path("file").write_bytes(b"0123456789")
    with pytest.raises(OSError, match="has 10 bytes, expected at most 9"):
        read_bytes(Path("file"), 9)
    assert read_bytes(Path("file"), 10) == b"0123456789" and is_regular(Path("file"))
    for name in special:  # the note on an engine that was kept
        assert _kept_report(Path("file"), Path(name)) is None
    Path("note").write_text(json.dumps({"seconds": 1}))
    assert _kept_report(Path("file"), Path("note")) is None


def test_a_long_name_of_long_letters() -> None:
    """Its temporary name must fit, too."""
    path = Path("🐈" * 60 + ".txt")
    replace_file(path, lambda temporary: temporary.write_text("x"))
    assert path.read_text() == "x"


def test_targets_that_cannot_be_written(special: list[str]) -> None:
    before = sorted(path.name for path in Path().iterdir())
    for name in ("/proc/x.json", "/proc/none/x.json", "note/x.json", "x" * 300 + ".json"):
        Path("note").touch()
        with pytest.raises(OSError, match=r"File name too long|Not a directory|No such file"):
            try_file(Path(name))
        with pytest.raises(OSError, match="choose another --out"):
            check_target(Path(name))
    with pytest.raises(ValueError, match="is a folder"):
        check_target(Path("folder"))
    with pytest.raises(ValueError, match="null"):
        check_target(Path("a\0b"))
    try_file(Path("not/yet/there.json"))
    assert sorted(path.name for path in Path().iterdir()) == sorted([*before, "note"])
