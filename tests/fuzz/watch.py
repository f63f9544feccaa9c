"""What a mutant may not do: open files elsewhere, start programs, run code of its own folder."""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_FORBIDDEN = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "pty.spawn",
              "os.startfile", "socket.connect", "socket.bind", "os.remove", "os.rename", "os.rmdir", "shutil.rmtree", "os.truncate",
              "os.chmod", "os.link", "os.symlink", "ctypes.dlopen", "webbrowser.open", "urllib.Request")  # fmt: skip
_SYSTEM = (("libnvidia-ml.so.1",), ("nvml.dll",))  # the driver, by which torch counts GPUs
_IN_OPEN, _IN_ACCESS = 0x20, 0x1


def _libraries() -> tuple[str, ...]:
    places = {sys.prefix, sys.base_prefix, str(ROOT / "mindomni_rt"), *(str(ROOT / n) for n in ("export", "kernels", "training", "benchmarks")),
              "/usr/lib", "/usr/local/lib", "/usr/share", "/lib", "/lib64", "/proc", "/sys", "/dev/null", "/dev/urandom",
              "/etc/localtime", "/etc/mime.types", str(Path(__file__).parent)}  # fmt: skip
    return tuple(sorted({os.path.realpath(place) for place in places if place} | places))


class Watch:
    """An audit hook for one process; it can not be removed, so it belongs into a child. found: what was seen."""

    def __init__(self, folder: Path) -> None:
        self.found: list[tuple[str, str]] = []
        self._folder = os.path.realpath(folder)
        self._allowed = (self._folder, *_libraries())
        self._busy = False

    def start(self) -> None:
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._busy:
            return
        self._busy = True
        try:
            if event == "open":
                self._open(*arguments)
            elif event in ("exec", "compile"):
                self._code(event, arguments)
            elif event in _FORBIDDEN and arguments not in _SYSTEM:
                self.found.append(("code", f"{event} {str(arguments)[:200]}"))
            elif event == "pickle.find_class" and not str(arguments[0]).startswith(("torch", "collections")):
                self.found.append(("code", f"pickle names {arguments}"))
        finally:
            self._busy = False

    def _open(self, path: Any, mode: Any, flags: int) -> None:
        if not isinstance(path, (str, bytes)):
            return
        real = os.path.realpath(os.fsdecode(path))
        if not any(real == place or real.startswith(place.rstrip("/") + "/") for place in self._allowed):
            self.found.append(("outside", f"open {real[:200]}"))
        elif flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC) and real != "/dev/null":
            self.found.append(("outside", f"write {real[:200]}"))

    def _code(self, event: str, arguments: tuple[Any, ...]) -> None:
        name = arguments[0].co_filename if event == "exec" else arguments[1]
        name = os.fsdecode(name) if isinstance(name, (str, bytes)) else str(name)
        # jinja2 compiles templates under this name and runs them in its sandbox; the others are Python's own.
        if name.startswith(
            ("<template>", "<frozen", "<string>", "<__array_function__", "<unknown>", "<attrs", "<eval")
        ):
            return
        real = os.path.realpath(name)
        if real.startswith(self._folder) or not any(real.startswith(place) for place in self._allowed):
            self.found.append(("code", f"{event} {name[:200]}"))


class Sentinel:
    """Tells whether files of a folder were opened by anything, native code included (inotify)."""

    def __init__(self, folder: Path) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._handle = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        assert self._handle >= 0, os.strerror(ctypes.get_errno())
        added = self._libc.inotify_add_watch(self._handle, os.fsencode(folder), _IN_OPEN | _IN_ACCESS)
        assert added >= 0, os.strerror(ctypes.get_errno())

    def opened(self) -> list[str]:
        """Names opened since the last call."""
        try:
            data = os.read(self._handle, 2**16)
        except BlockingIOError:
            return []
        names, at = set(), 0
        while at < len(data):
            _, mask, _, length = struct.unpack_from("iIII", data, at)
            name = data[at + 16 : at + 16 + length].rstrip(b"\0").decode()
            if name and not mask & 0x40000000:  # not of the folder itself
                names.add(name)
            at += 16 + length
        return sorted(names)
