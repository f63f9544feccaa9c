"""The nodes in a real ComfyUI: COMFYUI names its folder, COMFYUI_PYTHON the Python that runs it (docs/comfyui.md)."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
from PIL import Image
from workflow import FOLDER, as_prompt, read_workflow

import mindomni_rt
from mindomni_rt.demo import DEMO_MODELS

COMFYUI = os.environ.get("COMFYUI", "")
pytestmark = [pytest.mark.skipif(not COMFYUI, reason="COMFYUI is not set to the folder of a ComfyUI")]
PYTHON = os.environ.get("COMFYUI_PYTHON", sys.executable)
ROOT = Path(__file__).parents[2]
TEXT, PREVIEWS = 3, (1, 4)  # kinds of binary messages


class Server:
    """A ComfyUI on the loopback, and a websocket that collects its messages."""

    def __init__(self, port: int) -> None:
        self.address, self.client = f"127.0.0.1:{port}", uuid4().hex

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://{self.address}/{path}", timeout=20) as answer:
            return json.load(answer) if "json" in answer.headers["Content-Type"] else answer.read()

    def post(self, path: str, data: Any) -> Any:
        request = urllib.request.Request(f"http://{self.address}/{path}", json.dumps(data).encode())
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.read()

    def run(self, prompt: dict[str, Any], stop_at: int = 0) -> list[dict[str, Any]]:
        """Messages until the prompt has ended. stop_at: presses the stop button at that step of the first bar."""
        from websockets.sync.client import connect

        messages: list[dict[str, Any]] = []
        with connect(f"ws://{self.address}/ws?clientId={self.client}", max_size=2**26) as channel:
            self.post("prompt", {"prompt": prompt, "client_id": self.client})
            while True:
                message = channel.recv(timeout=120)
                if isinstance(message, bytes):
                    kind, length = int.from_bytes(message[:4], "big"), int.from_bytes(message[4:8], "big")
                    node = message[8 : 8 + length].decode() if kind == TEXT else ""
                    messages.append({"type": kind, "node": node, "data": message[8 + length :] if kind == TEXT else ""})
                    continue
                messages.append(json.loads(message))
                if messages[-1]["type"] == "progress" and messages[-1]["data"]["value"] == stop_at:
                    self.post("interrupt", {})
                if messages[-1]["type"] in ("execution_success", "execution_error", "execution_interrupted"):
                    return messages


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    pytest.importorskip("websockets", reason="following a prompt needs websockets")
    base = tmp_path_factory.mktemp("comfyui")
    (base / "custom_nodes").mkdir()
    (base / "custom_nodes" / "mindomni").symlink_to(FOLDER)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [PYTHON, "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(port), "--base-directory", str(base)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with (base / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--disable-api-nodes"], cwd=COMFYUI, env=environment, stdout=log, stderr=log
        )
        try:
            running, began = Server(port), time.monotonic()
            while True:
                try:
                    running.get("system_stats")
                    break
                except OSError:
                    told = (base / "log").read_text(encoding="utf-8", errors="replace")[-2000:]
                    assert process.poll() is None and time.monotonic() - began < 150, told
                    time.sleep(1)
            yield running
        finally:
            process.terminate()
            process.wait(30)


@pytest.fixture(scope="module")
def prompt(server: Server) -> dict[str, Any]:
    """The example workflow as the browser would send it."""
    widgets = {}
    for node in {n["type"] for n in read_workflow()["nodes"]}:
        info = server.get(f"object_info/{node}")[node]
        inputs = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
        plain = {n: (k, *o) for n, (k, *o) in inputs.items() if k in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")}
        widgets[node] = [(n, bool(o[0].get("control_after_generate")) if o else False) for n, (_, *o) in plain.items()]
    return as_prompt(read_workflow(), widgets)


def test_stub_is_what_comfyui_has() -> None:
    script = Path(__file__).with_name("compare_stub.py")
    done = subprocess.run([PYTHON, str(script)], cwd=COMFYUI, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stdout.strip(), done.stdout


def test_workflow_runs(server: Server, prompt: dict[str, Any]) -> None:
    messages = server.run(prompt)
    assert messages[-1]["type"] == "execution_success", messages[-1]
    outputs = {m["data"]["node"]: m["data"]["output"] for m in messages if m["type"] == "executed"}
    assert outputs["4"]["text"] == ["1 + 2 = 3. a lemon is yellow. a wheel is a circle."]
    assert outputs["8"]["text"] == outputs["9"]["text"] == ["four blue circles"]
    saved = outputs["5"]["images"][0]
    picture = Image.open(BytesIO(server.get(f"view?filename={saved['filename']}&type={saved['type']}")))
    expected = mindomni_rt.load(DEMO_MODELS[0][0]).generate(
        prompt["2"]["inputs"]["prompt"], seed=7, height=96, width=96, num_inference_steps=20, guidance_scale=1.0
    )
    assert np.array_equal(np.asarray(picture), np.asarray(expected.images[0]))
    bars = [(m["data"]["node"], m["data"]["value"], m["data"]["max"]) for m in messages if m["type"] == "progress"]
    assert bars == [(node, step, 20) for node in ("3", "6") for step in range(1, 21)]
    assert sum(m["type"] in PREVIEWS for m in messages) == 6
    texts = [m["data"].decode() for m in messages if m["type"] == TEXT and m["node"] == "2"]
    whole = f"{expected.thinking} {expected.answer}"
    assert len(texts) > 10 and texts[-1].split() == whole.split()


def test_another_seed_does_not_think_again(server: Server, prompt: dict[str, Any]) -> None:
    inputs = {**prompt["3"]["inputs"], "seed": 11}
    messages = server.run({**prompt, "3": {**prompt["3"], "inputs": inputs}})
    assert messages[-1]["type"] == "execution_success", messages[-1]
    cached = next(m["data"]["nodes"] for m in messages if m["type"] == "execution_cached")
    assert set(cached) >= {"1", "2", "4"} and "3" not in cached


def test_stop_button(server: Server, prompt: dict[str, Any]) -> None:
    inputs = {**prompt["3"]["inputs"], "steps": 1000, "seed": 12}
    began = time.monotonic()
    messages = server.run({**prompt, "3": {**prompt["3"], "inputs": inputs}}, stop_at=3)
    assert messages[-1]["type"] == "execution_interrupted" and messages[-1]["data"]["node_id"] == "3"
    steps = [m["data"]["value"] for m in messages if m["type"] == "progress"]
    assert max(steps) < 900 and time.monotonic() - began < 60
    assert server.run(prompt)[-1]["type"] == "execution_success"


def test_mistake_is_shown_with_our_message(server: Server, prompt: dict[str, Any]) -> None:
    inputs = {**prompt["2"]["inputs"], "prompt": " "}
    messages = server.run({**prompt, "2": {**prompt["2"], "inputs": inputs}})
    assert messages[-1]["type"] == "execution_error" and messages[-1]["data"]["node_id"] == "2"
    assert "the prompt is empty" in messages[-1]["data"]["exception_message"]
