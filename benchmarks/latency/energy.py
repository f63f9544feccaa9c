"""Energy of a run: the driver's own counter, else sampled power. Idle power is reported separately, not subtracted."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import mean
from typing import Any

from ..machine import HWMON, NONE, physical

_WHOLE = ("VDD_IN", "VIN", "POM_5V_IN")
"""Rails that carry all of a board, where it has one: the others are then part of it."""


class Energy:
    """Measures the requests that run within `over`, and idle power before them."""

    def __init__(self, device: str, every: float = 0.05, idle: float = 1.0, hwmon: Path = HWMON) -> None:
        """device: "cuda:N" is looked at, others not. every, idle: seconds between samples and of the idle watch."""
        self.method, self._power, self._counter = _readers(device, hwmon)
        self._every, self.joules = every, list[float]()
        with self._sampling() as samples:
            time.sleep(idle if self._power else 0)
        self.idle_watts = mean(samples) if samples else None

    @contextmanager
    def _sampling(self) -> Iterator[list[float]]:
        """Power in watts while the block runs."""
        stop, samples = threading.Event(), list[float]()

        def sample() -> None:
            while self._power is not None and not stop.wait(self._every):
                with suppress(OSError, ValueError):  # a sensor that is busy for once
                    samples.append(self._power())

        thread = threading.Thread(target=sample, daemon=True)
        thread.start()
        try:
            yield samples
        finally:
            stop.set()
            thread.join()

    @contextmanager
    def over(self, counts: bool) -> Iterator[None]:
        """Measures a block; counts says whether it is one of the runs. A block that fails is not counted."""
        if not counts or self._power is None:
            yield
        elif self._counter is not None:
            before = self._counter()
            yield
            self.joules.append(self._counter() - before)
        else:
            began = time.monotonic()
            with self._sampling() as samples:
                yield
            if samples:
                self.joules.append(mean(samples) * (time.monotonic() - began))

    def record(self) -> dict[str, Any] | str:
        """For the result's JSON: {"method", "joules" of each run, "idle_watts"}; "not available" without a sensor."""
        if not self.joules:
            return NONE
        return {"method": self.method, "joules": self.joules, "idle_watts": self.idle_watts}


def describe_energy(record: Any) -> str:
    """A record in words. Older results hold the words themselves."""
    if not isinstance(record, dict):
        return str(record)
    joules, idle = record["joules"], record["idle_watts"]
    share = f"idle power {idle:.1f} W is in it" if idle is not None else "idle power not available"
    return f"{sum(joules) / len(joules):.1f} J ({share}; {record['method']})"


def hwmon_rails(root: Path = HWMON) -> dict[str, Callable[[], float]]:
    """Watts by rail of a Jetson's INA monitors: INA238 (Thor) tells power, INA3221 (Orin) voltage and current."""
    found: dict[str, Callable[[], float]] = {}
    for folder in sorted(root.glob("hwmon*")):
        if not _text(folder / "name").startswith("ina"):
            continue
        for power in sorted(folder.glob("power*_input")):
            label = _text(folder / "label") or _text(folder / power.name.replace("_input", "_label"))
            found[label or f"{folder.name} {power.stem}"] = _product(power)
        for channel in (1, 2, 3):  # those above are sums and shunt voltages
            volts, amperes = folder / f"in{channel}_input", folder / f"curr{channel}_input"
            label = _text(folder / f"in{channel}_label") or f"{folder.name} {channel}"
            if volts.is_file() and amperes.is_file():
                found[label] = _product(volts, amperes)
    for whole in _WHOLE:
        if whole in found:
            return {whole: found[whole]}
    return {label: read for label, read in found.items() if not label.startswith("VDDQ")}  # fed by VIN_SYS_5V0


def _product(*paths: Path) -> Callable[[], float]:
    """Watts: microwatts as they are, or millivolts times milliamperes."""
    return lambda: math.prod(int(path.read_text()) for path in paths) / 1e6


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


Reader = Callable[[], float]


def _readers(device: str, hwmon: Path) -> tuple[str, Reader | None, Reader | None]:
    """(how it is measured, watts now, joules so far): NVML, its counter where the driver has one, or the monitors."""
    if not device.startswith("cuda"):
        return NONE, None, None
    try:
        import pynvml

        pynvml.nvmlInit()
        name = physical(device)
        by = pynvml.nvmlDeviceGetHandleByIndex if name.isdigit() else pynvml.nvmlDeviceGetHandleByUUID
        handle = by(int(name) if name.isdigit() else name)
        pynvml.nvmlDeviceGetPowerUsage(handle)
    except Exception:  # noqa: BLE001  NVML has an error class for each cause; the Jetson's monitors come next
        rails = hwmon_rails(hwmon)
        if not rails:
            return NONE, None, None
        return f"hwmon: {' + '.join(rails)}", lambda: sum(read() for read in rails.values()), None

    def watts() -> float:
        return float(pynvml.nvmlDeviceGetPowerUsage(handle)) / 1000

    def joules() -> float:
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000

    try:
        joules()
    except Exception:  # noqa: BLE001  as above; before Volta there is no counter
        return "NVML, sampled power", watts, None
    return "NVML energy counter", watts, joules
