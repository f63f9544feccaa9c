"""Runs mutants one after another, each in a forked process with limits, and judges how it ended.

The parent imports the libraries once and opens no onnxruntime session, so a fork has one thread and costs
milliseconds.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import select
import shutil
import signal
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mindomni_rt

from . import mutants, options, pictures, probe, seal
from .change import Mutant
from .sources import Source, make_sources
from .watch import Sentinel, Watch

SECONDS = 20  # of processor time: a machine that is busy with other work makes no hang
WALL = 60.0  # for those that wait without working
BYTES = 3 * 2**30
FAILURES = ("bare", "crash", "hang", "memory", "outside", "code", "silently different")
OUTCOMES = ("named", "right", "changed, as asked", *FAILURES)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a mutant ended: one of OUTCOMES, with what it said. seconds: of processor time."""

    seed: int
    number: int
    target: str
    kind: str
    source: str
    note: str
    outcome: str
    detail: str
    trace: str
    seconds: float
    peak: int


class Runner:
    """Everything that mutants share. Use with `with`: the temporary folder goes at the end, and the cache is as before."""

    def __init__(self, verbose: bool = False) -> None:
        self._root = Path(tempfile.mkdtemp(prefix="fuzz-", dir=_memory_folder()))
        self._verbose = verbose
        self._cache = os.environ.get("XDG_CACHE_HOME")
        os.environ["XDG_CACHE_HOME"] = "/proc/none"  # nothing is kept from one mutant for the next
        self.sources = make_sources(self._root / "sources")
        self._outside = self._root / "outside"
        self._outside.mkdir()
        for source in self.sources.values():
            for name, data in source.files.items():
                (self._outside / name.rpartition("/")[2]).write_bytes(data)
        self._sentinel = Sentinel(self._outside)
        _import_everything()
        self._prepared = probe.Prepared({name: source.folder for name, source in self.sources.items()})
        self._right: dict[str, str] = {}
        # What is done once a process is done here: libraries set themselves up on first use, and modules load late.
        probe.model(self.sources["checkpoint"].folder, with_image=True)
        for data in pictures.files().values():
            self._prepared.understand("x", data, max_new_tokens=1, max_image_tokens=16)
        mindomni_rt.load(self.sources["bundle"].folder, device="cpu")  # opens no session
        gc.collect()
        gc.freeze()

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        os.environ.pop("XDG_CACHE_HOME")
        if self._cache is not None:
            os.environ["XDG_CACHE_HOME"] = self._cache
        gc.unfreeze()
        shutil.rmtree(self._root, ignore_errors=True)

    def run(self, seed: int, numbers: Iterable[int]) -> Iterator[Outcome]:
        """The outcomes of these mutants."""
        for number in numbers:
            yield self.judge(mutants.make(self.sources, seed, number))

    def judge(self, mutant: Mutant) -> Outcome:
        """Runs one mutant and says how it ended."""
        right = "" if mutant.source.endswith("refused") else self._baseline(mutant)
        self._sentinel.opened()
        told, status, usage = self._fork(mutant)
        peak, seconds = usage.ru_maxrss * 1024, usage.ru_utime + usage.ru_stime
        outcome, detail = _judged(mutant, told, status, peak, right)
        if opened := self._sentinel.opened():
            outcome, detail = "outside", f"opened {opened[:3]}"
        return Outcome(
            seed=mutant.seed,
            number=mutant.number,
            target=mutant.target,
            kind=mutant.kind,
            source=mutant.source,
            note=mutant.change.note,
            outcome=outcome,
            detail=detail,
            trace=str(told.get("trace", "")),
            seconds=round(seconds, 2),
            peak=peak,
        )

    def _baseline(self, mutant: Mutant) -> str:
        """The digest of the unchanged model's result, computed in the same way."""
        key = f"{mutant.source}, image: {mutant.change.needs_image}"
        if key not in self._right:
            told, status, _ = self._fork(mutant, unchanged=True)
            assert told.get("ended") == "result" and status == 0, (key, told, status)
            self._right[key] = told["digest"]
        return self._right[key]

    def _fork(self, mutant: Mutant, unchanged: bool = False) -> tuple[dict[str, Any], int, resource.struct_rusage]:
        folder = self._root / "mutant"
        folder.mkdir()
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            self._child(mutant, folder, writing, unchanged)
        os.close(writing)
        try:
            return self._wait(pid, reading)
        finally:
            os.close(reading)
            shutil.rmtree(folder, ignore_errors=True)

    @staticmethod
    def _wait(pid: int, reading: int) -> tuple[dict[str, Any], int, resource.struct_rusage]:
        handle, data, end = os.pidfd_open(pid), b"", time.monotonic() + WALL
        try:
            while (left := end - time.monotonic()) > 0:
                ready, _, _ = select.select([reading, handle], [], [], left)
                if reading in ready:
                    piece = os.read(reading, 2**16)
                    data += piece
                    if piece:
                        continue
                if handle in ready or reading in ready:
                    break
            if not select.select([handle], [], [], max(0.0, end - time.monotonic()))[0]:
                signal.pidfd_send_signal(handle, signal.SIGKILL)
                data = b'{"ended": "hang"}'
        finally:
            os.close(handle)
        _, status, usage = os.wait4(pid, 0)
        with suppress(ValueError):
            return json.loads(data), status, usage
        return {}, status, usage

    def _child(self, mutant: Mutant, folder: Path, writing: int, unchanged: bool) -> None:
        """Never returns."""
        told: dict[str, Any] = {}
        try:
            if not self._verbose:
                null = os.open(os.devnull, os.O_RDWR)
                os.dup2(null, 1)
                os.dup2(null, 2)
            gc.disable()
            call = self._prepare(mutant, folder, unchanged)
            os.chdir(folder)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_DATA, (BYTES, BYTES))
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
            watch = Watch(folder)
            if (mutant.target == "options" and mutant.kind == "load option") or unchanged:
                watch._allowed = (*watch._allowed, str(self._root / "sources"))
            if mutant.target == "pictures" or unchanged:
                watch._allowed = (*watch._allowed, str(Path(__file__).parents[1] / "fixtures"))
            watch.start()
            told = probe.attempt(call)
            told["seen"] = list(watch.found)
        except BaseException as error:  # noqa: BLE001 a fault of the fuzzer itself
            told = {"ended": "fault", "error": repr(error)}
        finally:
            try:
                with open(writing, "wb") as file:
                    file.write(json.dumps(told).encode("ascii", "replace"))
            finally:  # also where the parent is gone: a child must not run the parent's code
                os._exit(0)

    def _prepare(self, mutant: Mutant, folder: Path, unchanged: bool) -> Any:
        if mutant.call is not None:
            return lambda: probe.digest(_plain(mutant, self._prepared) if unchanged else mutant.call(self._prepared))  # type: ignore[misc]
        source: Source = self.sources[mutant.source]
        files = {} if unchanged else dict(mutant.change.files)
        if files and source.is_bundle and mutant.fixed:
            files = seal.fixed(source, files, mutant.change.listed)
        probe.write(folder, source, files, self._outside)
        return lambda: probe.model(folder, mutant.change.needs_image)


def _plain(mutant: Mutant, pipe: Any) -> Any:
    """The request that a mutant of options or pictures changes."""
    if mutant.target == "pictures":
        return pipe.understand("what is it", pictures.files()["png"], max_new_tokens=1, seed=1, max_image_tokens=16)
    method, _, model = mutant.source.partition(" ")
    if method == "load":
        return mindomni_rt.load(pipe.sources[model], device="cpu").generate(**options.BASE)
    return options.request(pipe, method, {})


def _judged(mutant: Mutant, told: dict[str, Any], status: int, peak: int, right: str) -> tuple[str, str]:
    ended, error = told.get("ended"), str(told.get("error", ""))
    if ended == "fault":
        raise RuntimeError(f"mutant {mutant.seed}/{mutant.number}: the fuzzer failed: {error}")
    if ended == "hang" or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU):
        return "hang", f"more than {SECONDS} s of work or {WALL:g} s of waiting"
    if os.WIFSIGNALED(status) or ended is None:
        return "crash", f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(
            status
        ) else f"exit code {os.WEXITSTATUS(status)}"
    for kind, what in told.get("seen", ()):
        return kind, what
    if ended == "memory" or peak > BYTES:
        return "memory", f"{peak / 2**30:.1f} GiB {error}"
    if ended == "result":
        if told["digest"] == right:
            return "right", ""
        return ("changed, as asked", mutant.asked) if mutant.asked else ("silently different", "")
    return str(ended), error


def _memory_folder() -> str | None:
    """/dev/shm where it has room for the models and one mutant, else None: the folder for temporary files."""
    place = "/dev/shm"
    roomy = os.access(place, os.W_OK) and shutil.disk_usage(place).free > 2**28
    return place if roomy else None


def _import_everything() -> None:
    """Whatever a probe would import, so that each fork has it."""
    import jinja2.sandbox
    import onnxruntime
    import tokenizers
    import torch
    from PIL import Image

    torch.set_num_threads(1)
    Image.init()
    assert all((jinja2, onnxruntime, tokenizers))
