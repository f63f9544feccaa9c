"""The language model of a bundle is opened while `load` and its caller go on, its parts side by side."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

import mindomni_rt
from mindomni_rt.backends.compiled import onnx as backend
from mindomni_rt.bundle import manifest
from mindomni_rt.errors import BadBundleError

BUNDLE = Path(mindomni_rt.__file__).parents[1] / "assets" / "shapes-world-bundle"
REQUEST: dict[str, Any] = {"seed": 0, "num_inference_steps": 2, "max_new_tokens": 4, "output": "numpy"}


class Gate:
    """Sessions of a file wait for `go`; `opened` lists the threads that made each."""

    def __init__(self, patch: pytest.MonkeyPatch, file: str = "language.onnx") -> None:
        self.began, self.go, self.opened = threading.Event(), threading.Event(), list[str]()
        make = onnxruntime.InferenceSession

        def session(path: str, *args: Any, **options: Any) -> Any:
            if path.endswith(file):
                self.began.set()
                assert self.go.wait(60)
                self.opened.append(threading.current_thread().name)
            return make(path, *args, **options)

        patch.setattr(onnxruntime, "InferenceSession", session)


def test_it_is_open_before_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    pipe = mindomni_rt.load(BUNDLE, device="cpu")  # does not wait
    assert gate.began.wait(60) and gate.opened == []
    gate.go.set()
    first = pipe.generate("three red circles", **REQUEST)
    assert [name.startswith("open-language") for name in gate.opened] == [True]
    monkeypatch.undo()
    again = mindomni_rt.load(BUNDLE, device="cpu").generate("three red circles", **REQUEST)
    assert np.array_equal(first.images, again.images) and first.text == again.text


def test_closing_waits_for_what_is_being_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    pipe = mindomni_rt.load(BUNDLE, device="cpu")
    assert gate.began.wait(60)
    closing = threading.Thread(target=pipe.close)
    closing.start()
    closing.join(0.2)
    assert closing.is_alive()
    gate.go.set()
    closing.join(60)
    assert not closing.is_alive() and len(gate.opened) == 1


def test_parts_that_take_turns_are_not_opened_early(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(backend.OnnxRunner, "open_ahead", lambda _, graph: opened.append(graph))
    backend.load_onnx(BUNDLE, "cpu", resident=("vision", "vae"))
    assert opened == []
    backend.load_onnx(BUNDLE, "cpu")
    assert opened == ["language"]


def test_what_goes_wrong_is_raised_by_the_first_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(BUNDLE, tmp_path / "b")
    pipe_of = manifest.open_bundle

    def damaged(*args: Any, **options: Any) -> Any:
        found = pipe_of(*args, **options)
        (tmp_path / "b" / "language.onnx").write_bytes(b"nothing")  # after the check
        return found

    monkeypatch.setattr(backend, "open_bundle", damaged)
    pipe = mindomni_rt.load(tmp_path / "b", device="cpu")
    for _ in range(2):
        with pytest.raises(BadBundleError, match=r"language.onnx: onnxruntime .* refuses it"):
            pipe.generate("three red circles", **REQUEST)
    pipe.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
def test_a_forked_process_opens_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    pipe = mindomni_rt.load(BUNDLE, device="cpu")
    assert gate.began.wait(60)  # the thread is in the middle of it, and no child has it
    child = os.fork()
    if child == 0:
        gate.go.set()
        pipe.generate("three red circles", **REQUEST)
        os._exit(0 if len(gate.opened) == 1 else 1)
    gate.go.set()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_parts_are_opened_side_by_side_and_the_first_work_at_once(
    divided: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, ran = Gate(monkeypatch, "language.2.onnx"), threading.Event()
    run = backend._Session.run

    def noted(self: Any, *args: Any) -> None:
        run(self, *args)
        ran.set()

    monkeypatch.setattr(backend._Session, "run", noted)
    pipe = mindomni_rt.load(divided, device="cpu")
    results: list[Any] = []
    work = threading.Thread(target=lambda: results.append(pipe.generate("three red circles", **REQUEST)))
    work.start()
    assert ran.wait(60) and not gate.opened
    gate.go.set()
    work.join(60)
    whole = mindomni_rt.load(BUNDLE, device="cpu").generate("three red circles", **REQUEST)
    assert results[0].text == whole.text and np.array_equal(results[0].images, whole.images)
    assert pipe.backend.runner.waited["language"] > 0


def test_a_part_that_cannot_be_opened_is_tried_again(divided: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, refused = onnxruntime.InferenceSession, list[str]()

    def session(path: str, *args: Any, **options: Any) -> Any:
        if path.endswith("language.1.onnx") and not refused:
            refused.append(path)
            raise RuntimeError("no memory now")
        return make(path, *args, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    pipe = mindomni_rt.load(divided, device="cpu")
    with pytest.raises(BadBundleError, match=r"language\.1\.onnx: .*no memory now"):
        pipe.generate("three red circles", **REQUEST)
    assert pipe.generate("three red circles", **REQUEST).text


def test_a_draft_through_parts(divided: Path) -> None:
    request = {**REQUEST, "max_new_tokens": 12, "draft_tokens": 3}
    texts = [
        mindomni_rt.load(folder, device="cpu").generate("three red circles", **request).text
        for folder in (BUNDLE, divided)
    ]
    assert texts[0] == texts[1]


def test_only_a_divided_graph_is_read_ahead(divided: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`choose` names the language model's data file too, and needs a few bytes of it."""
    read: list[str] = []
    monkeypatch.setattr(backend, "_read_ahead", lambda path: read.append(path.name))
    for folder in (BUNDLE, divided):
        mindomni_rt.load(folder, device="cpu").generate("three red circles", **REQUEST)
    assert read == ["language.data"]
