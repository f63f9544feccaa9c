"""Runs the steps of a Dockerfile on this machine, in a folder: what a build does, where there is no Docker.

    python deploy/run_steps.py deploy/Dockerfile.cpu --into /tmp/app

COPY copies from the checkout, RUN runs in a shell, ENV and WORKDIR hold as in a build, with the folder as $APP. A RUN
whose comment begins with "System:" changes the system itself; it is listed and not run. Then the server is started as
in ENTRYPOINT, on a free local port, and asked as in HEALTHCHECK.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PORT = 8000


def steps(dockerfile: Path) -> Iterator[tuple[str, str, bool]]:
    """(instruction, arguments, whether it changes the system) in order; continued lines joined."""
    system, held = False, ""
    for line in dockerfile.read_text(encoding="utf-8").splitlines():
        line = held + line.strip()
        held = ""
        if line.startswith("#"):
            system = system or line.startswith("# System:")
        elif line.endswith("\\"):
            held = line[:-1]
        elif line:
            word, _, rest = line.partition(" ")
            yield word.upper(), rest.strip(), system and word.upper() == "RUN"
            system = system and word.upper() != "RUN"


class Build:
    """The state that steps change: environment, working folder, and what is to be started."""

    def __init__(self, into: Path, skip: tuple[str, ...] = ()) -> None:
        self.into, self.skip = into.resolve(), skip
        self.environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        self.environment["APP"] = str(self.into)
        self.folder = self.into
        self.entry: list[str] = []
        self.check = ""

    def run(self, word: str, rest: str, system: bool) -> None:
        """One step. Raises CalledProcessError and ValueError."""
        if system or any(part in rest for part in self.skip):
            say(f"not run here: {word} {rest}")
            return
        say(f"{word} {rest}")
        if word == "RUN":
            subprocess.run(rest, shell=True, cwd=self.folder, env=self.environment, check=True)
        elif word == "COPY":
            *sources, target = shlex.split(rest)
            self._copy(sources, self.folder / target)
        elif word == "WORKDIR":
            self.folder = self.folder / self._expand(rest)
            self.folder.mkdir(parents=True, exist_ok=True)
        elif word == "ENV":
            name, _, value = rest.partition("=")
            if name != "APP":  # here it is the given folder
                self.environment[name] = self._expand(value)
        elif word == "ENTRYPOINT":
            self.entry = json.loads(rest)
        elif word == "HEALTHCHECK":
            self.check = rest.partition(" CMD ")[2]
        elif word not in ("FROM", "USER", "EXPOSE"):
            raise ValueError(f"{word}: no such step here")

    def _expand(self, text: str) -> str:
        for name, value in self.environment.items():
            text = text.replace(f"${name}", value)
        return text

    @staticmethod
    def _copy(sources: list[str], target: Path) -> None:
        for source in (ROOT / name for name in sources):
            if source.is_dir():
                shutil.copytree(source, target, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                target.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, target)

    def serve(self, more: list[str]) -> None:
        """Starts the server, waits until the health check passes, and stops it in order. Raises RuntimeError."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        # On this machine alone, so without a key.
        command = [part if part != "0.0.0.0" else "127.0.0.1" for part in self.entry]
        say(f"ENTRYPOINT {command}")
        check = self.check.replace(f":{PORT}/", f":{port}/")
        process = subprocess.Popen([*command, *more, "--port", str(port)], cwd=self.folder, env=self.environment)
        try:
            for _ in range(300):
                done = subprocess.run(check, shell=True, cwd=self.folder, env=self.environment, capture_output=True)
                if done.returncode == 0:
                    break
                if process.poll() is not None:
                    raise RuntimeError(f"the server ended with code {process.returncode}")
                time.sleep(0.2)
            else:
                raise RuntimeError("the health check did not pass within 60 s")
            process.send_signal(signal.SIGTERM)
            if process.wait(60):
                raise RuntimeError(f"the server ended with code {process.returncode} after SIGTERM")
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        say("healthy, and stopped in order")


def say(text: str) -> None:
    """One line of progress."""
    sys.stdout.write(f"== {text}\n")
    sys.stdout.flush()


def main() -> int:
    """Exit code 0 where every step worked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dockerfile", type=Path)
    parser.add_argument("--into", type=Path, required=True, help="an empty folder")
    parser.add_argument("--skip", action="append", default=[], metavar="TEXT", help="leave out steps that hold this")
    parser.add_argument("--no-serve", action="store_true", help="build alone")
    options, more = parser.parse_known_args()
    options.into.mkdir(parents=True, exist_ok=True)
    build = Build(options.into, tuple(options.skip))
    for step in steps(options.dockerfile):
        build.run(*step)
    if not options.no_serve:
        build.serve(more)
    return 0


if __name__ == "__main__":
    sys.exit(main())
