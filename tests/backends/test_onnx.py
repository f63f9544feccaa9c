"""The language model of a bundle is opened while `load` and its caller go on."""

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
    """Sessions of language.onnx wait for `go`; `opened` lists the threads that made each."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.began, self.go, self.opened = threading.Event(), threading.Event(), list[str]()
        make = onnxruntime.InferenceSession

        def session(path: str, *args: Any, **options: Any) -> Any:
            if path.endswith("language.onnx"):
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
        os._exit(0 if gate.opened == ["MainThread"] else 1)
    gate.go.set()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
