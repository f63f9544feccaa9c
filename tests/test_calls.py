"""What the calls of a pipeline refuse, and that a result agrees with its own round."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mindomni_rt
from mindomni_rt import AsyncPipeline, BadBundleError, BadCheckpointError, BadRequestError, Pipeline
from mindomni_rt.bundle.reseal import reseal
from mindomni_rt.checkpoint.hub import resolve
from mindomni_rt.cli import main
from mindomni_rt.memory.fit import Fit
from mindomni_rt.serving.tasks import read_tasks

BUNDLE = Path(__file__).parents[1] / "assets" / "shapes-world-bundle"


@pytest.fixture(scope="module")
def pipe() -> Iterator[Pipeline]:
    with mindomni_rt.load(BUNDLE, device="cpu") as loaded:
        yield loaded


def test_an_edit_needs_a_picture(pipe: Pipeline) -> None:
    with pytest.raises(BadRequestError, match="image None"):
        pipe.edit(None, "the same, but red")
    with pytest.raises(BadRequestError, match="image None"):
        asyncio.run(AsyncPipeline(pipe).edit(None, "the same, but red"))


def test_an_answer_agrees_with_its_round(pipe: Pipeline) -> None:
    result = pipe.understand("what is this?", max_new_tokens=48, seed=0)
    assert "<think>" in result.text
    (written,) = result.rounds
    assert (result.thinking, result.answer) == (written.thinking, written.answer)
    assert result.thinking and result.answer and "<" not in result.thinking + result.answer


@pytest.mark.parametrize("progress", [3, "yes", None])
def test_progress_is_true_or_false(pipe: Pipeline, progress: Any) -> None:
    with pytest.raises(BadRequestError, match="progress"):
        pipe.generate("three yellow circles", progress=progress)


def test_a_pipeline_says_what_it_is(pipe: Pipeline) -> None:
    size = r"shapes-world-bundle \(\d\.\d M parameters\)"
    plan = r"all loaded, predicted peak \d\.\d\d GB"
    assert re.fullmatch(rf"<Pipeline {size}: onnx on cpu, float32; {plan}>", repr(pipe))
    taking_turns = Pipeline(pipe.backend, BUNDLE, Fit(device="cpu", dtype="float32", stays=("language", "vae")))
    assert repr(taking_turns).endswith("; stays loaded: language, vae>")


def test_the_parameters_of_a_checkpoint_are_counted() -> None:
    """Against the tensors of the same model as a checkpoint."""
    pytest.importorskip("torch", reason="checkpoints need torch")
    loaded = mindomni_rt.load(BUNDLE.with_name("shapes-world"), device="cpu")
    count = sum(p.numel() for p in loaded.backend.model.parameters())  # type: ignore[attr-defined]
    assert f"shapes-world ({count / 1e6:.1f} M parameters): torch on cpu, " in repr(loaded)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("data:image/png;base64,@@@", "image data:image/png;base64: its text after the comma is no base64"),
        ("", "image '': is an empty text"),
        ("A" * 60, "is no file, and its text is base64, but holds no picture"),
    ],
)
def test_a_picture_is_refused_in_its_own_words(pipe: Pipeline, image: str, message: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        pipe.edit(image, "the same, but red")
    assert message in str(caught.value)


def test_settings_of_what_is_no_picture_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "embed.py"
    path.write_text("import mindomni_rt")
    with pytest.raises(BadRequestError) as caught:
        mindomni_rt.read_settings(path)
    assert str(caught.value) == f"image {path} cannot be read: expected PNG, JPEG or WebP"


def test_a_budget_that_is_the_cause_is_named() -> None:
    with pytest.raises(mindomni_rt.OutOfMemoryError, match=r"memory_budget is 1000000 bytes.*raise memory_budget"):
        mindomni_rt.load(BUNDLE, device="cpu", memory_budget="1MB")


def test_names_of_other_types_are_refused(pipe: Pipeline) -> None:
    result = pipe.understand("what is this?", max_new_tokens=1)
    with pytest.raises(BadRequestError, match="path None"):
        result.save(None)  # type: ignore[arg-type]
    with pytest.raises(BadRequestError, match="adapter 3"):
        pipe.load_adapter(3)  # type: ignore[arg-type]


def test_the_small_model_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve("demo") == BUNDLE
    (tmp_path / "demo").mkdir()
    assert resolve("demo") == Path("demo")


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_name_is_no_model(name: str) -> None:
    with pytest.raises(BadCheckpointError, match="name is empty"):
        mindomni_rt.load(name)


@pytest.mark.parametrize("backend", ["auto", "onnx"])
def test_a_folder_without_a_model_is_told_so_before_a_missing_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    monkeypatch.setattr("mindomni_rt.loading.find_spec", lambda name: None)
    with pytest.raises(BadCheckpointError):
        mindomni_rt.load(tmp_path, backend=backend)


def test_only_a_bundle_is_sealed_again(tmp_path: Path) -> None:
    for folder in (tmp_path / "nope", tmp_path):
        with pytest.raises(BadBundleError, match=r"has no manifest\.json"):
            reseal(folder)
    (tmp_path / "manifest.json").write_text("[")
    with pytest.raises(BadBundleError, match="cannot be read"):
        reseal(tmp_path)


def test_onnxruntime_leaves_nothing_in_the_home(tmp_path: Path) -> None:
    script = f"import mindomni_rt; mindomni_rt.load({str(BUNDLE)!r}, device='cpu').understand('?', max_new_tokens=1)"
    home = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    given = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    subprocess.run([sys.executable, "-c", script], check=True, env=given | home)
    assert {path.parts[len(tmp_path.parts)] for path in tmp_path.rglob("*")} == {"cache"}
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"mindomni-rt"}


@pytest.mark.parametrize(
    ("name", "said"), [("generat", "did you mean generate?"), ("xyzw", "expected one of generate")]
)
def test_an_unknown_command_is_answered_with_the_nearest(
    capsys: pytest.CaptureFixture[str], name: str, said: str
) -> None:
    assert main([name]) == 2
    assert said in capsys.readouterr().err


def test_a_batch_names_all_its_mistakes(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n[]\n{"prompt": "a", "task": "sing"}\n')
    with pytest.raises(BadRequestError, match=r"line 2: expected an object.*; line 3: task"):
        read_tasks(path, "demo", {})
    path.write_text("[]\n" * 12)
    with pytest.raises(BadRequestError, match=r"line 10: [^;]*; 2 more$"):
        read_tasks(path, "demo", {})


def test_a_port_in_use_ends_the_page_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["ui", "--port", str(taken.getsockname()[1])]) == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said and "in use" in said
