"""The machine beside a measurement: what it is, how it is set, what it draws. "not available": it cannot be read."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_NONE = "not available"


def commit() -> str:
    """The commit of this checkout, with a plus if files were changed."""
    folder = Path(__file__).parents[1]
    try:
        found = _output(["git", "-C", str(folder), "rev-parse", "--short=12", "HEAD"])
        changed = _output(["git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no"])
    except OSError:
        return _NONE
    return f"{found}{'+' if changed else ''}" if found else _NONE


def describe_machine() -> dict[str, str]:
    """Processor, memory, GPU, power mode, clocks, throttling."""
    found = {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
    }
    with contextlib.suppress(OSError, ValueError):
        found["memory"] = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.1f} GB"
    gpu = _query("name,power.limit,clocks.sm,clocks.mem,clocks_throttle_reasons.active")
    if gpu:
        found |= dict(zip(("gpu", "power limit", "SM clock", "memory clock", "throttling"), gpu, strict=False))
    if shutil.which("nvpmodel"):  # a Jetson
        found["power mode"] = _output(["nvpmodel", "-q"]).replace("\n", " ") or _NONE
        found["jetson_clocks"] = (_output(["jetson_clocks", "--show"]).splitlines()[0:1] and "read") or _NONE
    return found


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("model name", "Model")):
                return line.partition(":")[2].strip()
    return platform.processor() or _NONE


def _query(fields: str) -> list[str]:
    if not shutil.which("nvidia-smi"):
        return []
    line = _output(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]).splitlines()
    return [part.strip() for part in line[0].split(",")] if line else []


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    return done.stdout.strip() if done.returncode == 0 else ""


def hwmon(root: Path = Path("/sys/class/hwmon")) -> list[Path]:
    """Power inputs of a Jetson's INA monitors, in microwatts."""
    return sorted(p for p in root.glob("hwmon*/power*_input") if p.is_file())


class Energy:
    """Power sampled while requests run, and idle power before them."""

    def __init__(self, device: str, every: float = 0.05, idle: float = 1.0) -> None:
        self._read = _power_reader(device)
        self._every, self._joules, self._runs = every, 0.0, 0
        self._idle = self._watch(idle) if self._read else 0.0

    def _watch(self, seconds: float) -> float:
        assert self._read is not None
        samples = []
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            samples.append(self._read())
            time.sleep(self._every)
        return sum(samples) / len(samples)

    @contextmanager
    def over(self, counts: bool) -> Iterator[None]:
        """Measures a block; counts says whether it is one of the runs."""
        if self._read is None or not counts:
            yield
            return
        stop, samples = threading.Event(), list[float]()
        read = self._read

        def sample() -> None:
            while not stop.wait(self._every):
                samples.append(read())

        thread = threading.Thread(target=sample, daemon=True)
        began = time.monotonic()
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
        if samples:
            self._joules += sum(samples) / len(samples) * (time.monotonic() - began)
            self._runs += 1

    def report(self) -> str:
        """Joules an image and idle watts, or that nothing could be read."""
        if self._read is None or not self._runs:
            return _NONE
        return f"{self._joules / self._runs:.1f} J (idle power {self._idle:.1f} W is in it)"


def _power_reader(device: str) -> Callable[[], float] | None:
    """Watts now, from NVML or a Jetson's monitors; None where neither is there."""
    if not device.startswith("cuda"):
        return None
    inputs = hwmon()
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(int(device.partition(":")[2] or 0))
        pynvml.nvmlDeviceGetPowerUsage(handle)
    except Exception:  # noqa: BLE001  NVML has an error class for each cause; the Jetson's monitors come next
        if not inputs:
            return None
        return lambda: sum(int(p.read_text()) for p in inputs) / 1e6
    return lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / 1000
