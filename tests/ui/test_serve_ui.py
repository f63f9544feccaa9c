"""The page as a part of `mindomni serve --ui`: its login, the server's limits, and the server's end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from fastapi.testclient import TestClient

from mindomni_rt import Request
from mindomni_rt.demo import DEMO_MODELS
from mindomni_rt.serving.app import create_app
from mindomni_rt.serving.engine import Engine
from mindomni_rt.serving.errors import ApiError
from mindomni_rt.serving.model import Model
from mindomni_rt.serving.server import _Limited, _mount_page
from mindomni_rt.serving.settings import Settings

ROOT = Path(__file__).parents[2]
SMALL = Model(path=str(DEMO_MODELS[0][0]))


def test_page_has_a_login_and_the_routes_keep_their_key() -> None:
    settings = Settings(api_key="secret", page="/ui")
    engine = Engine(SMALL.load)
    app = create_app(engine, settings, SMALL)
    _mount_page(app, engine, settings, SMALL)
    client = TestClient(app)  # not entered: the model is not loaded
    assert client.get("/ui/").status_code == 200 and client.get("/ui/config").status_code == 401
    assert client.get("/v1/models").status_code == 401 and client.get("/uis").status_code == 401
    wrong, right = ({"username": "me", "password": word} for word in ("wrong", "secret"))
    assert client.post("/ui/login", data=wrong).status_code == 400
    assert client.post("/ui/login", data=right).status_code == 200
    assert client.get("/ui/config").status_code == 200
    assert client.get("/v1/models").status_code == 401  # a login is no key
    other = {"origin": "http://elsewhere.example"}
    assert client.get("/ui/config", headers=other).status_code == 403


def test_page_is_held_to_the_limits_of_the_server() -> None:
    limited = _Limited(Engine(SMALL.load), Settings(max_steps=10))
    with pytest.raises(ApiError, match="11 steps; this server takes at most 10"):
        limited.stream(Request(prompt="x", num_inference_steps=11))


@pytest.mark.skipif(os.name != "posix", reason="SIGTERM is POSIX")
def test_open_page_does_not_hold_up_the_end() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "mindomni_rt", "serve", "--ui", "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            address = next(found[1] for line in process.stderr if (found := re.search(r"(http://\S+)/v1", line)))
            for line in process.stderr:
                if "model loaded" in line:
                    break
            with httpx.stream("GET", f"{address}/ui/gradio_api/heartbeat/page", timeout=20) as heartbeat:
                lines = heartbeat.iter_lines()
                assert "ALIVE" in next(lines)
                process.send_signal(signal.SIGTERM)
                process.communicate(timeout=20)  # it waits for other connections for 40 s
            assert process.returncode == 0
        finally:
            process.kill()
