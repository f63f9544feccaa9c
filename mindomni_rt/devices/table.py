"""`devices.toml` as checked data: one table of devices for export, planner and cost model. Needs no torch."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from ..errors import BadRequestError, UnsupportedDeviceError

FILE = Path(__file__).with_name("devices.toml")
PEAKS = ("fp32", "bf16", "fp8", "int8", "fp4", "int4")
# Not ours to use: CUDA's context and the desktop on a card of its own, the system on memory that the CPU shares.
RESERVE = {False: 700 * 10**6, True: 2000 * 10**6}
_BRANDS = ("nvidia", "geforce", "jetson", "tesla", "rtx", "gpu")


@dataclass(frozen=True, kw_only=True)
class Device:
    """Figures of one device: TFLOP/s, GB/s, GiB. See the head of devices.toml for each one's meaning."""

    key: str
    name: str
    memory: float
    source: str
    bandwidth: float = 0.0
    peak: Mapping[str, float] = field(default_factory=dict)
    aliases: Sequence[str] = ()
    sm: str = ""
    unified: bool = False
    sustained: float = 0.0
    ceiling: Mapping[str, float] = field(default_factory=dict)
    seen: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for table in (self.peak, self.ceiling, self.seen):
            unknown = sorted(set(table) - set(PEAKS))
            if unknown or any(value <= 0 for value in table.values()):
                raise BadRequestError(f"device {self.key}: {unknown or 'a figure that is not positive'} in its peaks")
        if self.memory <= 0 or self.bandwidth < 0 or not self.source:
            raise BadRequestError(f"device {self.key}: memory, a bandwidth that is not negative, and source are needed")

    @property
    def bytes(self) -> int:
        """Memory in bytes."""
        return round(self.memory * 2**30)

    @property
    def reserve(self) -> int:
        """Bytes of it that the system, the driver and the desktop hold: an allowance, not a measurement."""
        return RESERVE[self.unified]

    @property
    def missing(self) -> str:
        """What a floor needs and the table lacks, as words: "bandwidth", "peak rates", both, or nothing."""
        known = {"bandwidth": self.bandwidth, "peak rates": self.peak}
        return " and ".join(name for name, figure in known.items() if not figure)

    @property
    def speed(self) -> float:
        """Bandwidth for floors, GB/s."""
        return self.sustained or self.bandwidth

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

    def spellings(self) -> set[str]:
        """Every spelling of the device's name, as `_plain` writes them."""
        return {_plain(name, self.memory) for name in (self.key, self.name, *self.aliases)}


@dataclass(frozen=True)
class Sheet:
    """All devices, and the efficiencies that predictions assume."""

    devices: Mapping[str, Device]
    efficiency: Mapping[str, float]

    @cached_property
    def _spellings(self) -> dict[str, Device]:
        found: dict[str, Device] = {}
        for device in self.devices.values():
            for name in device.spellings():
                if name in found:
                    raise BadRequestError(f"devices {found[name].key} and {device.key} are both called {name!r}")
                found[name] = device
        return found

    def named(self, text: str) -> Device | None:
        """The device of that name in any spelling ("RTX 4090", "4090", "NVIDIA GeForce RTX 4090"), None if unknown."""
        names = self._spellings
        whole = names.get(_plain(text))
        if whole is not None:
            return whole
        return next((d for d in self.devices.values() if names.get(_plain(text, d.memory)) is d), None)

    def find(self, text: str) -> Device:
        """The device of that name. Raises UnsupportedDeviceError, which names the three nearest."""
        device = self.named(text)
        if device is None:
            raise UnsupportedDeviceError(f"device {text!r} is unknown; the nearest are {', '.join(self.nearest(text))}")
        return device

    def nearest(self, text: str) -> list[str]:
        """Keys of the three devices whose names look most like the text."""

        def likeness(device: Device) -> float:
            wanted = _plain(text)
            return max(difflib.SequenceMatcher(None, wanted, name).ratio() for name in device.spellings())

        return [d.key for d in sorted(self.devices.values(), key=likeness, reverse=True)[:3]]


def _plain(name: str, memory: float | None = None) -> str:
    """A name without case, punctuation and makers' brands; with `memory`, without that size in GB too."""
    words = re.findall(r"[a-z0-9]+", name.lower())
    text = re.sub("|".join(_BRANDS), "", "".join(words))
    return text if memory is None else text.replace(f"{memory:g}gb", "")


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


def find_device(name: str) -> Device:
    """The device of that name in the shipped table. Raises UnsupportedDeviceError, which names the three nearest."""
    return load_devices().find(name)


def with_figures(names: Sequence[str] | None, sheet: Sheet) -> list[Device]:
    """Devices by name for the cost model; None: all that have the figures it needs.

    Raises UnsupportedDeviceError for an unknown name and for a device whose bandwidth or peak rates are not known.
    """
    if names is None:
        return [d for d in sheet.devices.values() if not d.missing]
    devices = [sheet.find(name) for name in names]
    for device in devices:
        if device.missing:
            raise UnsupportedDeviceError(
                f"{device.name}: no {device.missing} in {FILE.name}, so it has no floor and no prediction"
            )
    return devices
