"""The machine beside a measurement: what it is and how it is set. "not available": it cannot be read."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import mindomni_rt
from mindomni_rt import checkout

from .clocks import NONE, power_mode, query

PACKAGES = ("torch", "onnxruntime", "tensorrt-rtx", "tensorrt", "triton", "transformers", "diffusers", "numpy")


def commit() -> str:
    """The commit of this checkout, with a plus if files were changed."""
    return checkout.commit() or NONE


def versions() -> dict[str, str]:
    """Of Python, of this package and of those that a result may depend on."""
    found = {"python": platform.python_version(), "mindomni_rt": mindomni_rt.__version__}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def describe_machine(device: str = "cuda:0") -> dict[str, str]:
    """Processor, memory, GPU, power limit and power mode. What changes while it runs: `clocks.clock_state`.

    device: the CUDA device that is measured; for any other the first GPU is described.
    """
    device = device if device.startswith("cuda") else "cuda:0"
    found = {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
    }
    with contextlib.suppress(OSError, ValueError, AttributeError):  # sysconf is POSIX
        found["memory"] = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.1f} GB"
    if gpu := query("name,driver_version,power.limit", device):
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
