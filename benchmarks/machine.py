"""The machine beside a measurement: what it is, how it is set, and what holds its clocks back.

What the tools print: `nvpmodel -q` "NV Power Mode: MAXN" and the mode's number; `jetson_clocks --show` (as root) a line
with MinFreq, MaxFreq, CurrentFreq for each processor (kHz), the GPU and the memory (Hz): equal least and most mean
pinned clocks. "not available": it cannot be read.
"""

from __future__ import annotations

import gc
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import mindomni_rt
from mindomni_rt import checkout
from mindomni_rt.memory.machine import read_machine

from .results import FORMAT

NONE = "not available"
HWMON = Path("/sys/class/hwmon")
_REASONS = {  # nvml.h, nvmlClocksEventReason*
    0x1: "idle",
    0x2: "application clocks",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "thermal slowdown (software)",
    0x40: "thermal slowdown (hardware)",
    0x80: "power brake",
    0x100: "display clocks",
}
_FREQUENCIES = re.compile(
    r"^(?P<unit>\w+):?\s+(?:Online=(?P<online>\d)\s+)?.*?"
    r"MinFreq=(?P<low>\d+)\s+MaxFreq=(?P<high>\d+)\s+CurrentFreq=(?P<now>\d+)",
    re.MULTILINE,
)
PACKAGES = ("torch", "onnxruntime", "tensorrt-rtx", "tensorrt", "triton", "transformers", "diffusers", "numpy")


def commit() -> str:
    """The commit of this checkout, with a plus if files were changed."""
    return checkout.commit() or NONE


def header(kind: str) -> dict[str, Any]:
    """What every result file of a kind begins with; versions are of Python, of this package and of PACKAGES."""
    ours = {"python": platform.python_version(), "mindomni_rt": mindomni_rt.__version__}
    when, versions = time.strftime("%Y-%m-%d"), ours | checkout.installed(PACKAGES)
    return {"kind": kind, "format": FORMAT, "date": when, "commit": commit(), "versions": versions}


def describe_machine(device: str = "cuda:0") -> dict[str, str]:
    """Processor, memory, GPU, power limit and power mode. What changes while it runs: `clock_state`.

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


def output(command: Sequence[str], timeout: float = 20) -> str:
    """What a tool prints; empty where it is missing, fails, lacks rights or does not answer in time (seconds)."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout)
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def physical(device: str) -> str:
    """What NVML and nvidia-smi call "cuda:N", which count all GPUs where CUDA counts those it may see.

    The UUID that torch tells, else the entry of CUDA_VISIBLE_DEVICES (an index or a UUID), else N.
    """
    index = int(device.partition(":")[2] or 0)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)
        if uuid is not None:
            return f"GPU-{str(uuid).removeprefix('GPU-')}"
    seen = [entry.strip() for entry in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if entry.strip()]
    return seen[index] if index < len(seen) else str(index)


def query(fields: str, device: str = "cuda:0") -> list[str]:
    """Fields of a GPU by nvidia-smi; empty without one or where it does not know a field.

    device: another than a CUDA one stands for the first GPU.
    """
    device = device if device.startswith("cuda") else "cuda:0"
    if not shutil.which("nvidia-smi"):
        return []
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "-i", physical(device)]
    lines = output(command).splitlines()
    found = [part.strip() for part in lines[0].split(",")] if lines else []
    return found if len(found) == fields.count(",") + 1 else []


def power_mode() -> str:
    """A Jetson's power mode with its number: "MAXN (0)"."""
    text = output(["nvpmodel", "-q"])
    found = re.search(r"NV Power Mode:\s*(.+?)\s*$(?:\s*^(\d+)\s*$)?", text, re.MULTILINE)
    if not found:
        return " ".join(text.split()) or NONE
    return f"{found[1]} ({found[2]})" if found[2] else found[1]


def pinned_clocks() -> str:
    """Whether `jetson_clocks` holds processors and GPU at their most, and the frequencies now."""
    text = output(["jetson_clocks", "--show"])
    rows = [m for m in _FREQUENCIES.finditer(text) if m["online"] != "0"]
    held = [m["low"] == m["high"] for m in rows if re.match(r"cpu\d+|GPU", m["unit"])]
    if not held:
        return NONE
    state = "pinned" if all(held) else "not pinned"
    now = {m["unit"]: f"{int(m['now']) / 1e6:.0f} MHz" for m in rows if m["unit"] in ("GPU", "EMC")}
    return ", ".join([state, *(f"{unit} {frequency}" for unit, frequency in now.items())])


def throttling(device: str = "cuda:0") -> str:
    """Why a GPU's clocks are below their most, in words; "none" where nothing holds them."""
    for name in ("clocks_event_reasons.active", "clocks_throttle_reasons.active"):  # the second: older drivers
        with suppress(ValueError, IndexError):  # no such field, or "[N/A]"
            found = query(name, device)[0]
            bits = int(found, 16)
            return ", ".join(text for bit, text in _REASONS.items() if bits & bit) or ("none" if not bits else found)
    return NONE


def over_current(root: Path = HWMON) -> str:
    """A Jetson's counts of over-current events since it started, which throttle it: "oc1 0, oc2 15"."""
    found = []
    for path in sorted(root.glob("hwmon*/oc*_event_cnt")):
        with suppress(OSError):
            found.append(f"{path.name.partition('_')[0]} {path.read_text().strip()}")
    return ", ".join(found) or NONE


def clock_state(device: str = "cuda:0", root: Path = HWMON) -> dict[str, str]:
    """Clocks, temperature and throttling now; empty on a machine without an NVIDIA GPU."""
    found: dict[str, str] = {}
    if gpu := query("clocks.sm,clocks.mem,temperature.gpu", device):
        names = ("SM clock", "memory clock", "temperature")
        found |= dict(zip(names, gpu, strict=True)) | {"throttling": throttling(device)}
    if shutil.which("nvpmodel"):  # a Jetson
        found |= {"jetson_clocks": pinned_clocks(), "over-current events": over_current(root)}
    return found
