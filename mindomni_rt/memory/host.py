"""Memory of the host that this process may use, from the system's own files and calls: no psutil.

Linux counts what the kernel can give without swapping (MemAvailable: free pages and page cache that it can take back),
and no more than the control groups of the process leave. A group's own page cache counts as free for the same reason.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_UNLIMITED = 2**60  # version 1 of control groups writes a number near 2**63 for "no limit"


@dataclass(frozen=True)
class HostMemory:
    """Bytes: of the machine or of the tightest limit, and of that what is free now."""

    total: int
    free: int


def host_memory(root: Path = Path("/")) -> HostMemory | None:
    """Memory of this host; None where it cannot be read. root: of the file system, for tests."""
    if (root / "proc/meminfo").is_file():
        return _linux(root)
    with suppress(OSError, ValueError, KeyError, AttributeError, subprocess.SubprocessError):
        if sys.platform == "win32":
            return _windows()
        if sys.platform == "darwin":
            sizes = _output("sysctl", "-n", "hw.memsize")
            return parse_vm_stat(_output("vm_stat"), int(sizes))
        page = os.sysconf("SC_PAGE_SIZE")
        return HostMemory(page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES"))
    return None


def _linux(root: Path) -> HostMemory | None:
    values = _table((root / "proc/meminfo").read_text(encoding="utf-8"))
    total = values.get("MemTotal")
    free = values.get("MemAvailable", sum(values.get(k, 0) for k in ("MemFree", "Buffers", "Cached")))
    if total is None:
        return None
    for group in _groups(root):
        total, free = min(total, group.total), min(free, group.free)
    return HostMemory(total, free)


def _table(text: str) -> dict[str, int]:
    """ "name: 12 kB" or "name 12" on each line, in bytes."""
    found = re.findall(r"^(\S+?):?[ \t]+(\d+)(?: (kB))?[ \t]*$", text, re.MULTILINE)
    return {name: int(count) * (1024 if unit else 1) for name, count, unit in found}


def _groups(root: Path) -> Iterator[HostMemory]:
    """The limits of the process's control group and of every group above it."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    mount = root / "sys/fs/cgroup"
    for line in lines:
        if line.count(":") < 2:
            continue
        number, kinds, path = line.split(":", 2)
        if number == "0" and not kinds:
            for base in (mount, mount / "unified"):
                yield from _found(base, path, ("memory.max", "memory.high"), "memory.current", "")
        elif "memory" in kinds.split(","):
            yield from _found(mount / "memory", path, ("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_")


def _found(base: Path, path: str, limits: tuple[str, ...], usage: str, prefix: str) -> Iterator[HostMemory]:
    folder = base / path.strip("/")
    # In a container the path may be the host's, of which only the root is mounted: it is among the parents.
    for group in (folder, *folder.parents):
        if not group.is_relative_to(base):
            return
        limit = min((n for n in (_number(group / name) for name in limits) if n is not None), default=None)
        used = _number(group / usage)
        if limit is None or limit >= _UNLIMITED or used is None:
            continue
        cached = 0
        with suppress(OSError):
            statistics = _table((group / "memory.stat").read_text(encoding="utf-8"))
            cached = sum(statistics.get(f"{prefix}{kind}_file", 0) for kind in ("active", "inactive"))
        yield HostMemory(limit, min(max(limit - used + cached, 0), limit))


def _number(path: Path) -> int | None:
    """The number in a file; None for "max", or where there is no such file."""
    try:
        return int(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout


def parse_vm_stat(text: str, total: int) -> HostMemory:
    """macOS: pages that are free or hold what can be read again. Raises KeyError for another text."""
    size = int(re.findall(r"page size of (\d+) bytes", text)[0]) if "page size of" in text else 4096
    pages = {name: int(count) for name, count in re.findall(r'^"?([^":]+)"?:\s+(\d+)\.', text, re.MULTILINE)}
    kinds = ("Pages inactive", "Pages speculative", "Pages purgeable")
    return HostMemory(total, size * (pages["Pages free"] + sum(pages.get(kind, 0) for kind in kinds)))


def _windows() -> HostMemory:
    class Status(ctypes.Structure):
        _fields_ = (
            ("length", ctypes.c_ulong),
            ("load", ctypes.c_ulong),
            *((name, ctypes.c_ulonglong) for name in ("total", "free", "file", "file_free", "own", "own_free", "more")),
        )

    status = Status()
    status.length = ctypes.sizeof(Status)
    if not ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):  # type: ignore[attr-defined]
        raise OSError("GlobalMemoryStatusEx failed")
    return HostMemory(int(status.total), int(status.free))


def cpu_threads() -> int:
    """Threads of one operator on the CPU: OMP_NUM_THREADS, of which a list names the outermost level first, else the
    cores that this process may use. A value that is not a number counts as absent, as OpenMP has it."""
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if first.isdecimal() and len(first) <= 4 and int(first):
        return int(first)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def host_peak() -> int | None:
    """Bytes that this process held at most; None where the system does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
