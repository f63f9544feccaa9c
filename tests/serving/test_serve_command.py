"""`mindomni serve` as a process: what it refuses to do, and how it stops."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import mindomni_rt
from mindomni_rt.cli import main
from serving.serving_tools import BUNDLE, PROMPT, SMALL, decoded, same

ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def command(*options: str, **more: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}
    process = subprocess.Popen(
        [sys.executable, "-m", "mindomni_rt", "serve", "--port", str(port), *options],
        env=environment, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.kill()
        process.communicate()


def await_text(url: str, text: str) -> None:
    """A line of an answer."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        if text in httpx.get(url).text.splitlines():
            return
        time.sleep(0.02)
    raise AssertionError(f"{url} never had {text!r}")


def await_ready(url: str) -> None:
    end = time.monotonic() + 100
    while time.monotonic() < end:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/ready").status_code == 200:
                return
        time.sleep(0.05)
    raise AssertionError("not ready")


def test_the_demo_is_served_with_its_own_settings_and_stops_in_order(pipe: mindomni_rt.Pipeline) -> None:
    """SIGTERM while a request runs and another waits: both are answered, later ones refused, the code is 0."""
    with command() as (url, process):
        await_ready(url)
        answers: list[httpx.Response] = []

        def ask(**body: Any) -> None:
            answers.append(httpx.post(f"{url}/v1/images/generations", json={"prompt": PROMPT, **body}, timeout=60))

        threads = [
            threading.Thread(target=ask, kwargs={"num_inference_steps": 200, "n": 3, "think": False}),
            threading.Thread(target=ask, kwargs={"seed": 7}),
        ]
        for thread, seen in zip(
            threads, ("mindomni_queue_seconds_count 1.0", "mindomni_queue_length 1.0"), strict=True
        ):
            thread.start()
            await_text(f"{url}/metrics", seen)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
        with pytest.raises(httpx.HTTPError):
            for _ in range(100):
                refused = httpx.post(f"{url}/v1/images/generations", json={"prompt": PROMPT})
                assert refused.status_code == 503
        for thread in threads:
            thread.join(60)
        assert [a.status_code for a in answers] == [200, 200], [a.text for a in answers]
        assert process.wait(30) == 0
        last = answers[-1].json()
        alone = pipe.generate(PROMPT, seed=7, **{**SMALL, "height": 96, "width": 96, "num_inference_steps": 10})
        assert same(decoded(last["data"][0]["b64_json"]), alone.images[0])
        assert "Traceback" not in process.stderr.read()  # type: ignore[union-attr]


def test_a_model_that_cannot_be_loaded_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    with command(str(tmp_path), "-q") as (_, process):
        assert process.wait(60) == 2
        err = process.stderr.read()  # type: ignore[union-attr]
        assert len(err.strip().splitlines()) == 1 and err.startswith("error: "), err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--host", "0.0.0.0"], "MINDOMNI_API_KEY"),
        (["--host", "::"], "MINDOMNI_API_KEY"),
        (["--port", "99999"], "expected 0 to 65535"),
        (["--host", "no.such.host.invalid", "--no-auth"], "--host no.such.host.invalid"),
        (["--max-queue", "0"], "max_queue = 0"),
        (["--deadline", "nan"], "deadline = nan"),
        (["--default", "size=7"], "multiple of 16"),
        (["--default", "steps=7"], "no option 'steps'"),
        (["--default", "seed"], "expected FIELD=VALUE"),
        (["--api-key", "a\nb"], "API key"),
        (["--replicas", "none"], "LEAST:MOST"),
    ],
)
def test_mistakes(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", BUNDLE, *options]) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert len(err) == 1 and words in err[0], err


COMMANDS = {
    "serve": [],
    "serve --replicas": ["--replicas", "2"],
    "serve --ui": ["--ui"],
    "ui": [],
}


def _broken(kind: str, folder: Path) -> str:
    """A MODEL that is none."""
    if kind == "empty folder":
        folder.mkdir()
    elif kind == "file":
        folder.write_text("x")
    elif kind == "damaged bundle":
        folder.mkdir()
        (folder / "manifest.json").write_text("{")
    elif kind == "half a checkpoint":
        shutil.copytree(ROOT / "assets" / "shapes-world", folder)
        shutil.rmtree(folder / "vae")
    return str(folder)


@pytest.mark.parametrize("kind", ["missing", "file", "empty folder", "damaged bundle", "half a checkpoint"])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_wrong_model_is_one_line_before_a_server_starts(
    name: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(*_: Any) -> None:
        raise AssertionError("a port was bound")

    monkeypatch.setattr(socket.socket, "bind", started)
    model = _broken(kind, tmp_path / "model")
    assert main([name.split()[0], model, *COMMANDS[name]]) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert len(err) == 1 and err[0].startswith("error: ") and model in err[0], err


def test_what_looks_like_a_hub_id_is_asked_for_its_configuration_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing relative folder looks like one. Nothing of gigabytes is downloaded before the server answers 503."""
    asked: list[Any] = []

    def offline(name: str, **options: Any) -> str:
        asked.append((name, options["allow_patterns"]))
        raise ConnectionError("no network")

    monkeypatch.setattr("mindomni_rt.checkpoint.hub._silence", lambda *_: None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    assert main(["serve", "models/missing"]) == 2
    assert asked == [("models/missing", "*.json")]
    assert capsys.readouterr().err == (
        "error: no folder at models/missing, and the hub did not provide it: no network\n"
    )
