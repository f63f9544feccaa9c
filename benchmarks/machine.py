"""The machine beside a measurement: what it is and how it is set. "not available": it cannot be read."""

from __future__ import annotations

import gc
import platform
import shutil
import sys
import time
from typing import Any

import mindomni_rt
from mindomni_rt import checkout
from mindomni_rt.memory.machine import read_machine

from .clocks import NONE, power_mode, query
from .schema import FORMAT

PACKAGES = ("torch", "onnxruntime", "tensorrt-rtx", "tensorrt", "triton", "transformers", "diffusers", "numpy")


def commit() -> str:
    """The commit of this checkout, with a plus if files were changed."""
    return checkout.commit() or NONE


def header(kind: str) -> dict[str, Any]:
    """What every result file of a kind begins with."""
    when = time.strftime("%Y-%m-%d")
    return {"kind": kind, "format": FORMAT, "date": when, "commit": commit(), "versions": versions()}


def versions() -> dict[str, str]:
    """Of Python, of this package and of those that a result may depend on."""
    here = {"python": platform.python_version(), "mindomni_rt": mindomni_rt.__version__}
    return here | checkout.installed(PACKAGES)


def describe_machine(device: str = "cuda:0") -> dict[str, str]:
    """Processor, memory, GPU, power limit and power mode. What changes while it runs: `clocks.clock_state`.

    device: the CUDA device that is measured; for any other the first GPU is described.
    """
    here = read_machine(with_gpus=False)
    found = {"system": f"{platform.system()} {platform.machine()}", "cpu": here.cpu or NONE, "cores": str(here.cores)}
    if here.host:
        found["memory"] = f"{here.host.total / 1e9:.1f} GB"
    if gpu := query("name,driver_version,power.limit", device):
        found |= dict(zip(("gpu", "driver", "power limit"), gpu, strict=True))
    if shutil.which("nvpmodel"):  # a Jetson
        found["power mode"] = power_mode()
    return found


def device_peak(device: Any) -> dict[str, int] | None:
    """Bytes that torch allocated and reserved at most on a CUDA device; None on others and where it is not used."""
    torch = sys.modules.get("torch")
    if torch is None or not str(device).startswith("cuda"):
        return None
    cuda = torch.cuda
    return {
        "peak_bytes": int(cuda.max_memory_allocated(device)),
        "reserved_bytes": int(cuda.max_memory_reserved(device)),
    }


def free_memory() -> None:
    """Gives unused device memory back."""
    gc.collect()
    if torch := sys.modules.get("torch"):
        torch.cuda.empty_cache()  # does nothing without CUDA
