"""`mindomni serve --replicas 2` on a local Ray: the same application, and what a killed replica takes with it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

import mindomni_rt
from mindomni_rt.errors import BadCheckpointError, BadRequestError
from serving.serving_tools import BUNDLE, PROMPT, SMALL, decoded, same

ROOT = Path(__file__).parents[2]


def test_numbers_of_replicas() -> None:
    pytest.importorskip("ray", reason="replicas need the extra ray")
    from mindomni_rt.serving.ray_serve import parse_replicas

    assert parse_replicas("4") == (4, 4) and parse_replicas("1:8") == (1, 8)
    for wrong in ("", "0", "0:2", "3:2", "-1", "two", "1:2:3", "9" * 99):
        with pytest.raises(BadRequestError, match="LEAST:MOST"):
            parse_replicas(wrong)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_model_is_looked_for_where_the_replicas_run() -> None:
    pytest.importorskip("ray", reason="replicas need the extra ray")
    from mindomni_rt.serving.model import Model
    from mindomni_rt.serving.ray_cluster import check_there, cluster

    with cluster(None, 1) as ray:
        check_there(ray, Model(path=BUNDLE))
        with pytest.raises(BadCheckpointError, match="no folder at /none/such"):
            check_there(ray, Model(path="/none/such"))


@contextlib.contextmanager
def replicas(*options: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    defaults = [f"--default={name}={value}" for name, value in SMALL.items()]
    command = ["serve", BUNDLE, "--device", "cpu", "--port", str(port), "--replicas", "2", *defaults, *options]
    process = subprocess.Popen([sys.executable, "-m", "mindomni_rt", *command], cwd=ROOT, env=environment)
    try:
        url = f"http://127.0.0.1:{port}"
        end = time.monotonic() + 150
        while time.monotonic() < end and process.poll() is None:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{url}/ready").status_code == 200:
                    break
            time.sleep(0.2)
        yield url, process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(90)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


def replica_processes(root: int) -> list[int]:
    """Process ids of the replicas among the descendants of a process and of Ray's daemons that it started."""
    psutil = pytest.importorskip("psutil", reason="finding a replica's process needs psutil, which Ray brings")
    found = []
    for process in psutil.Process(root).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any("ServeReplica" in part for part in process.cmdline()):
                found.append(process.pid)
    return found


@pytest.mark.slow
@pytest.mark.timeout(290)
def test_a_killed_replica_takes_only_what_it_was_running(pipe: mindomni_rt.Pipeline) -> None:
    pytest.importorskip("ray", reason="replicas need the extra ray")
    right = {seed: pipe.generate(PROMPT, think=False, seed=seed, **SMALL).images[0] for seed in range(10)}
    answered, failed = [], []
    todo = list(range(100))

    def client(url: str) -> None:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as api:
            while todo:
                seed = todo.pop() % 10
                try:
                    answer = api.images.generate(prompt=PROMPT, extra_body={"seed": seed, "think": False})
                    answered.append(same(decoded(answer.data[0].b64_json or ""), right[seed]))
                except openai.APIStatusError as error:
                    failed.append(error.status_code)

    with replicas() as (url, process):
        threads = [threading.Thread(target=client, args=(url,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        while len(answered) < 20:
            time.sleep(0.01)
        before = replica_processes(process.pid)
        assert len(before) == 2
        os.kill(before[0], signal.SIGKILL)
        for thread in threads:
            thread.join(120)
        assert len(answered) + len(failed) == 100 and all(answered)
        # One it was painting and one that waited behind it, at most; clients that retry see no error.
        assert len(failed) <= 2 and all(status >= 500 for status in failed)
        end = time.monotonic() + 60
        while len(set(replica_processes(process.pid)) - {before[0]}) < 2:
            assert time.monotonic() < end  # Ray starts another
            time.sleep(0.5)
        api = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        events = list(
            api.images.generate(prompt=PROMPT, stream=True, partial_images=1, extra_body={"seed": 1, "think": False})
        )
        assert same(decoded(events[-1].b64_json), right[1])
        with pytest.raises(openai.BadRequestError, match="multiple of 16"):
            api.images.generate(prompt=PROMPT, size="100x100")
    assert process.returncode == 0
