"""Prompt files of `quality` that are missing, damaged or unsafe: one line that says where, and nothing is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import PARITY
from quality_cases import PAINT, dpg_folder, geneval_file, quality, wise_folder

from mindomni_rt.benchmarks.cli import main

LINE = json.dumps({"tag": "colors", "include": [], "prompt": "a red bell"})
WISE_ROW = {"prompt_id": 1, "Prompt": "a bell", "Explanation": "", "Category": "", "Subcategory": ""}


def refused(suite: str, prompts: Path, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    """The error line of a run that must not begin."""
    out = prompts.parent / "refused"
    assert quality(suite, prompts, out, *more) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and not out.exists()
    return error


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "holds no prompts"),
        ("\n\n", "holds no prompts"),
        (LINE + "\n\n" + LINE, "line 2: expected one JSON object"),
        (LINE + "\n{", "line 2: expected one JSON object"),
        ("[1]", "line 1: expected one JSON object with prompt"),
        ('{"tag": "colors"}', "line 1: expected a text under 'prompt', found None"),
        ('{"prompt": "a bell"}', "line 1: expected a text under 'tag'"),
        ('{"tag": "colors", "prompt": "  "}', "expected a text under 'prompt'"),
        ('{"tag": "colors", "prompt": 3}', "found 3"),
        ('{"tag": "colors", "prompt": "\\ud800"}', "half a surrogate pair"),
        ("[" * 100_000, "line 1: expected one JSON object"),
        ("\udcff", "not UTF-8 text"),
    ],
)
def test_geneval_lines(text: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    error = refused("geneval", path, capsys)
    assert expected in error and str(path) in error


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], "holds no prompts"),
        ({"prompt_id": 1}, "expected a list of objects"),
        (["a bell"], "entry 1: expected an object"),
        ([WISE_ROW, WISE_ROW], "entry 2: id '1' was already used at"),
        ([WISE_ROW, {**WISE_ROW, "prompt_id": "1"}], "id '1' was already used"),
        ([{**WISE_ROW, "prompt_id": None}], "id 'None' cannot name a file"),
        ([{**WISE_ROW, "prompt_id": True}], "cannot name a file"),
        ([{**WISE_ROW, "prompt_id": "../1"}], "id '../1' cannot name a file"),
        ([{**WISE_ROW, "prompt_id": "a/b"}], "cannot name a file"),
        ([{**WISE_ROW, "prompt_id": "a\\b"}], "cannot name a file"),
        ([{**WISE_ROW, "prompt_id": ".."}], "cannot name a file"),
        ([{**WISE_ROW, "prompt_id": "a\nb"}], "cannot name a file"),
        ([{**WISE_ROW, "prompt_id": "a\0b"}], "cannot name a file"),
        ([{**WISE_ROW, "prompt_id": "\ud800"}], "cannot name a file"),
        ([{**WISE_ROW, "prompt_id": "ü" * 101}], "at most 200 bytes"),
        ([{**WISE_ROW, "Prompt": ""}], "expected a text under 'Prompt'"),
        ("{", "is not JSON"),
        ('[{"prompt_id": ' + "9" * 5000 + "}]", "is not JSON"),  # more digits than Python reads
    ],
)
def test_wise_entries(rows: object, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "natural_science.json"
    path.write_text(rows if isinstance(rows, str) else json.dumps(rows))
    assert expected in refused("wise", path, capsys)


@pytest.mark.parametrize(
    ("names", "expected"),
    [(["a.b"], "holds a dot"), ([], "holds no prompts"), (["ü" * 101], "at most 200 bytes")],
)
def test_dpg_names(names: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert expected in refused("dpg", dpg_folder(tmp_path, names), capsys)


def test_dpg_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = dpg_folder(tmp_path, ["1", "2"])
    (folder / "2.txt").write_text(" \n")
    assert "2.txt: expected a text" in refused("dpg", folder, capsys)
    (folder / "2.txt").write_bytes(b"\xff\xfe")
    assert "2.txt is not UTF-8 text" in refused("dpg", folder, capsys)
    assert "expected a folder of .txt files" in refused("dpg", folder / "notes.md", capsys)


@pytest.mark.parametrize(
    ("suite", "file", "project"),
    [
        ("geneval", "evaluation_metadata.jsonl", "djghosh13/geneval"),
        ("dpg", "dpg_bench/prompts", "TencentQQGYLab/ELLA"),
        ("wise", "cultural_common_sense.json", "PKU-YuanGroup/WISE"),
    ],
)
def test_missing_prompts_say_whose_file_is_needed(
    suite: str, file: str, project: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refused(suite, tmp_path / "nothing", capsys)
    assert file in error and project in error
    empty = tmp_path / "empty"
    empty.mkdir()
    assert file in refused(suite, empty, capsys)
    assert main(["quality", suite, str(PARITY), "--out", str(tmp_path / "run")]) == 2
    assert "--prompts is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("suite", "more", "expected"),
    [
        ("geneval", ["--shard", "0/2"], "--shard '0/2': expected I/N"),
        ("geneval", ["--shard", "3/2"], "expected I/N"),
        ("geneval", ["--shard", "x"], "expected I/N"),
        ("geneval", ["--shard", "1/2/3"], "expected I/N"),
        ("geneval", ["--n", "0"], "--n 0: expected at least 1"),
        ("geneval", ["--samples", "0"], "--samples 0"),
        ("dpg", ["--samples", "5"], "DPG-Bench takes 1 to 4"),
        ("wise", ["--samples", "2"], "WISE takes 1 to 1"),
        ("geneval", ["--size", "33"], "multiple of 16"),
        ("geneval", ["--steps", "0"], "num_inference_steps = 0"),
        ("geneval", ["--guidance", "nan"], "guidance_scale = nan"),
        ("geneval", ["--max-new-tokens", "0"], "--max-new-tokens"),
        ("geneval", ["--size", "32x48"], "--size 32x48: expected a square"),
        ("geneval", ["--size", "big"], "size 'big': expected WIDTHxHEIGHT"),
        ("geneval", ["--backend", "toaster"], "backend 'toaster'"),
    ],
)
def test_options(
    suite: str, more: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"geneval": geneval_file, "dpg": dpg_folder, "wise": wise_folder}
    assert expected in refused(suite, files[suite](tmp_path), capsys, *more)


def test_arguments_that_lack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, expected in (
        ([], "suite None: expected one of geneval"),
        (["toast"], "suite 'toast'"),
        (["wise"], "MODEL is missing"),
        (["wise", str(PARITY)], "--out is missing"),
        (["shapes", str(PARITY), "--out", str(tmp_path / "o"), "--prompts", "x"], "has its own riddles"),
        (["shapes", "no-such/x/y", "--out", str(tmp_path / "o")], "no folder at"),
    ):
        assert main(["quality", *arguments]) == 2
        assert expected in capsys.readouterr().err


def test_folders_may_stand_for_their_files(tmp_path: Path) -> None:
    geneval_file(tmp_path, 1)
    assert quality("geneval", tmp_path, tmp_path / "one", "--samples", "1") == 0
    folder = dpg_folder(tmp_path, ["1"])
    assert quality("dpg", folder / "1.txt", tmp_path / "two", "--samples", "1") == 0
    assert (tmp_path / "two" / "images" / "1.png").exists()


def test_a_prompt_that_the_model_cannot_take_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "evaluation_metadata.jsonl", tmp_path / "run"
    path.write_text(LINE + "\n" + LINE.replace("a red bell", "two <|image_pad|>") + "\n" + LINE + "\n")
    assert main(["quality", "geneval", str(PARITY), "--prompts", str(path), "--out", str(out), *PAINT]) == 2
    assert f"{path}, line 2: prompt holds the image placeholder" in capsys.readouterr().err
    assert "partial: 1 of 3 items" in (out / "report.md").read_text()
