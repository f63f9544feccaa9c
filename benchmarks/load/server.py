"""The server under test: `mindomni serve` as a process of its own, on this machine alone."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

import httpx

from mindomni_rt.errors import BadRequestError


@contextlib.contextmanager
def server(model: str, options: Sequence[str]) -> Iterator[str]:
    """Its address, once it takes requests. At the end it is stopped by SIGTERM and must end in order."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mindomni_rt", "serve", model, "--port", str(port), "--quiet", *options]
    process = subprocess.Popen(command)
    url = f"http://127.0.0.1:{port}"
    try:
        _await_ready(process, url)
        yield url
        process.send_signal(signal.SIGTERM)
        if process.wait(60):
            raise BadRequestError(f"the server ended with code {process.returncode} after SIGTERM; expected 0")
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _await_ready(process: subprocess.Popen[bytes], url: str) -> None:
    end = time.monotonic() + 600
    while time.monotonic() < end:
        if process.poll() is not None:
            raise BadRequestError(f"the server ended with code {process.returncode} while it loaded the model")
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/ready", trust_env=False).status_code == 200:
                return
        time.sleep(0.1)
    raise BadRequestError("the server was not ready within 600 s")
