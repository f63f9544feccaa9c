"""What a build took, measured while it runs, and appended to a JSON file."""

from __future__ import annotations

import platform
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mindomni_rt.bundle.manifest import Manifest
from mindomni_rt.errors import BadRequestError
from mindomni_rt.outputs import check_target, read_json, write_json


@contextmanager
def watching() -> Iterator[dict[str, int]]:
    """The peak of the process's own memory (without file pages that can be dropped), sampled every 50 ms."""
    found = {"bytes": 0}
    stop = threading.Event()

    def sample() -> None:
        while True:
            found["bytes"] = max(found["bytes"], anonymous_bytes())
            if stop.wait(0.05):
                return

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()


def anonymous_bytes() -> int:
    """Bytes of this process that are backed by no file; the peak so far where /proc does not tell."""
    try:
        text = Path("/proc/self/status").read_text(encoding="ascii")
        return int(next(line.split()[1] for line in text.splitlines() if line.startswith("RssAnon:"))) * 1024
    except (OSError, StopIteration):
        return resident_peak()


def resident_peak() -> int:
    """The most bytes that were resident, mapped files with them; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def build_run(manifest: Manifest, command: str, seconds: float, own: int, resident: int) -> dict[str, Any]:
    """A build as a record. own: peak of the process's own memory; resident: with mapped files."""
    graphs = {
        name: {
            "precision": graph.precision,
            "file_bytes": manifest.files[graph.file].bytes,
            "data": list(graph.data),
            **{k: v for k, v in graph.report.items() if k in ("export_seconds", "build_seconds", "weight_error")},
        }
        for name, graph in manifest.graphs.items()
    }
    return {
        "command": command,
        "target": ",".join(manifest.targets) or "cpu",
        "dtype": manifest.dtype,
        "seconds": round(seconds, 1),
        "own_memory_peak": own,
        "resident_peak": resident,
        "bundle_bytes": sum(entry.bytes for entry in manifest.files.values()),
        "data_bytes": {name: entry.bytes for name, entry in manifest.files.items() if name.endswith(".data")},
        "graphs": graphs,
        "built_by": dict(manifest.built_by),
    }


def check_record(path: Path, option: str) -> None:
    """Raises BadRequestError or StorageError if a run cannot be added to `path`, before the work that it records."""
    check_target(path, option)
    _runs("", path)


def _runs(what: str, path: Path) -> dict[str, Any]:
    """A file of runs; a new one where there is none. Raises BadRequestError for a file that holds something else."""
    if not path.exists():
        return {"what": what, "runs": []}
    data = read_json(path)
    if not isinstance(data, dict) or not isinstance(data.get("runs"), list):
        raise BadRequestError(f"{path} holds no list of runs: choose another file")
    return data


def append(what: str, run: Mapping[str, Any], path: Path) -> None:
    """Adds a run, with date and machine, to a file of runs; it is made where there is none."""
    data = _runs(what, path)
    machine = f"{platform.machine()}, {platform.system()}, Python {platform.python_version()}"
    data["runs"].append({"date": time.strftime("%Y-%m-%d"), "machine": machine, **run})
    write_json(path, data)
