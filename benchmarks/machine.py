"""The machine beside a measurement: what it is and how it is set. "not available": it cannot be read."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
from pathlib import Path

from .clocks import NONE, output, power_mode, query


def commit() -> str:
    """The commit of this checkout, with a plus if files were changed."""
    folder = str(Path(__file__).parents[1])
    found = output(["git", "-C", folder, "rev-parse", "--short=12", "HEAD"])
    changed = output(["git", "-C", folder, "status", "--porcelain", "--untracked-files=no"])
    return f"{found}{'+' if changed else ''}" if found else NONE


def describe_machine() -> dict[str, str]:
    """Processor, memory, GPU, power limit and power mode. What changes while it runs: `clocks.clock_state`."""
    found = {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
    }
    with contextlib.suppress(OSError, ValueError):
        found["memory"] = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.1f} GB"
    if gpu := query("name,driver_version,power.limit"):
        found |= dict(zip(("gpu", "driver", "power limit"), gpu, strict=True))
    if shutil.which("nvpmodel"):  # a Jetson
        found["power mode"] = power_mode()
    return found


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("model name", "Model")):
                return line.partition(":")[2].strip()
    return platform.processor() or NONE
