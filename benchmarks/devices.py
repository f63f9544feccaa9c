"""`devices.toml` as checked data."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from mindomni_rt.errors import BadRequestError

FILE = Path(__file__).with_name("devices.toml")
PRECISIONS = ("fp32", "bf16", "fp8", "int8", "fp4", "int4")


@dataclass(frozen=True, kw_only=True)
class Device:
    """Figures of one device: TFLOP/s, GB/s, GB. See the head of devices.toml for each one's meaning."""

    key: str
    name: str
    memory: float
    bandwidth: float
    peak: Mapping[str, float]
    source: str
    match: str = ""
    sm: str = ""
    unified: bool = False
    sustained: float = 0.0
    ceiling: Mapping[str, float] = field(default_factory=dict)
    seen: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for table in (self.peak, self.ceiling, self.seen):
            unknown = sorted(set(table) - set(PRECISIONS))
            if unknown or any(value <= 0 for value in table.values()):
                raise BadRequestError(f"device {self.key}: {unknown or 'a figure that is not positive'} in its peaks")
        if self.memory <= 0 or self.bandwidth <= 0 or not self.source:
            raise BadRequestError(f"device {self.key}: memory, bandwidth and source are needed")

    def best(self, precisions: tuple[str, ...]) -> float | None:
        """Highest ceiling among precisions in TFLOP/s; None where the device has none of them."""
        return max((self.ceiling.get(p, self.peak[p]) for p in precisions if p in self.peak), default=None)

    def reached(self, precisions: tuple[str, ...], efficiency: float) -> float | None:
        """What software may be expected to reach: ceiling x efficiency, but no more than the best seen so far."""
        return max(
            (
                min(self.ceiling.get(p, self.peak[p]) * efficiency, self.seen.get(p, float("inf")))
                for p in precisions
                if p in self.peak
            ),
            default=None,
        )

    @property
    def speed(self) -> float:
        """Bandwidth for floors, GB/s."""
        return self.sustained or self.bandwidth


@dataclass(frozen=True)
class Sheet:
    """All devices, and the efficiencies that predictions assume."""

    devices: Mapping[str, Device]
    efficiency: Mapping[str, float]

    def named(self, text: str) -> Device | None:
        """The device whose `match` is the longest within a GPU's name."""
        found = [d for d in self.devices.values() if d.match and d.match.lower() in text.lower()]
        return max(found, key=lambda d: len(d.match), default=None)


@lru_cache(maxsize=4)
def load_devices(path: Path = FILE) -> Sheet:
    """Reads a sheet. An unknown key or a missing figure is BadRequestError naming the device."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadRequestError(f"{path}: not a readable device sheet: {error}") from error
    devices = {key: _device(key, values) for key, values in data.get("devices", {}).items()}
    efficiency = {key: float(entry["value"]) for key, entry in data.get("efficiency", {}).items()}
    if not devices:
        raise BadRequestError(f"{path}: no [devices.…] table")
    return Sheet(devices, efficiency)


def _device(key: str, values: Mapping[str, Any]) -> Device:
    unknown = sorted(set(values) - {f.name for f in fields(Device)})
    if unknown:
        raise BadRequestError(f"device {key}: unknown keys {unknown}")
    try:
        return Device(key=key, **values)
    except TypeError as error:
        raise BadRequestError(f"device {key}: {error}") from error


def choose(keys: list[str] | None, sheet: Sheet) -> list[Device]:
    """Devices by key, all of them for None."""
    unknown = sorted(set(keys or ()) - set(sheet.devices))
    if unknown:
        raise BadRequestError(f"unknown device {unknown[0]!r}; known are {', '.join(sheet.devices)}")
    return [d for k, d in sheet.devices.items() if keys is None or k in keys]
