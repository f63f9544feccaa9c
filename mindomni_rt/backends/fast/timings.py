"""Times of candidates, kept on disk: what one process has measured, the next one reads.

A time is known by the device, the versions of torch, CUDA and Triton, the text of the kernels, and what was timed.
"""

from __future__ import annotations

import hashlib
import json
import logging
from functools import lru_cache
from pathlib import Path

import torch

from mindomni_rt.kernels import launch
from mindomni_rt.kernels.triton_compat import HAS_TRITON, triton

from ...files import cache_folder, read_text, write_text

logger = logging.getLogger(__name__)
Times = dict[str, float]


def folder() -> Path:
    """Where they are: `$XDG_CACHE_HOME/mindomni-rt/timings`, or the same under `~/.cache`."""
    return cache_folder() / "timings"


@lru_cache(maxsize=1)
def _kernels() -> str:
    texts = (path.read_bytes() for path in sorted(Path(launch.__file__).parent.glob("*.py")))
    return hashlib.sha256(b"\0".join(texts)).hexdigest()


def _file(index: int) -> Path:
    """One file for a device and everything that its times depend on."""
    found = torch.cuda.get_device_properties(index)
    triton_version = triton.__version__ if HAS_TRITON else ""
    parts = (found.name, found.major, found.minor, found.total_memory, torch.__version__, torch.version.cuda)
    text = json.dumps([*parts, triton_version, _kernels()])
    return folder() / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"


def known(device: torch.device, label: str) -> Times | None:
    """Milliseconds by candidate; None where nothing was measured or on a device without a clock of its own."""
    if device.type != "cuda":
        return None
    found = _read(_file(device.index or 0)).get(label)
    if not isinstance(found, dict) or not found:
        return None
    return {str(name): float(time) for name, time in found.items()}


def keep(device: torch.device, label: str, times: Times) -> None:
    """Stores what was measured. A folder that cannot be written to is logged and costs a measurement later."""
    if device.type != "cuda" or not times:
        return
    path = _file(device.index or 0)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({**_read(path), label: times}, indent=1, sort_keys=True) + "\n")
    except OSError as error:
        logger.info("timings are not kept: %s", error)


def _read(path: Path) -> dict[str, object]:
    try:
        found = json.loads(read_text(path))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
