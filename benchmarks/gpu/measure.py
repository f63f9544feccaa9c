"""Clocks, ceilings and the record of a run of `gpu_suite`."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], Any]
FLUSH = 512 << 20  # bytes written between runs: more than any L2


@dataclass
class Meter:
    """Times work on one device. Each figure is the median of `runs` after a warm-up, the L2 flushed before each."""

    device: torch.device
    runs: int = 10
    deadline: float = float("inf")
    _flush: Tensor | None = field(default=None, repr=False)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def wait(self) -> None:
        """For the device."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def left(self) -> float:
        """Seconds until the suite must end."""
        return self.deadline - time.perf_counter()

    def once(self, run: Run) -> tuple[float, Any]:
        """(seconds, result) of one run by the host's clock, the device's work included."""
        self.wait()
        began = time.perf_counter()
        result = run()
        self.wait()
        return time.perf_counter() - began, result

    def kernel(self, run: Run) -> float:
        """Seconds of one launch by the device's clock (the host's on a CPU)."""
        run()
        run()
        if not self.cuda:
            return median(self.once(run)[0] for _ in range(self.runs))
        if self._flush is None:
            self._flush = torch.empty(FLUSH, dtype=torch.int8, device=self.device)
        times = []
        for _ in range(self.runs):
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush.zero_()
            began.record()
            run()
            ended.record()
            ended.synchronize()
            times.append(began.elapsed_time(ended) / 1e3)
        return median(times)

    def peak(self) -> int:
        """Bytes allocated at most since `restart`; 0 on a CPU."""
        return int(torch.cuda.max_memory_allocated(self.device)) if self.cuda else 0

    def restart(self) -> None:
        """Forgets the peak."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.device)


def machine(device: torch.device) -> dict[str, Any]:
    """What ran: device, versions, commit."""
    versions: dict[str, str | None] = {}
    for name in ("torch", "triton", "transformers", "diffusers"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    found: dict[str, Any] = {"python": platform.python_version(), "versions": versions, "commit": _commit()}
    if device.type != "cuda":
        return {**found, "cpu": platform.processor() or platform.machine(), "gpu": None}
    properties = torch.cuda.get_device_properties(device)
    return {
        **found,
        "gpu": properties.name,
        "sm": 10 * properties.major + properties.minor,
        "memory": properties.total_memory,
        "cuda": torch.version.cuda,
        "clocks": _clocks(),
    }


def _commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return done.stdout.strip() or None


def _clocks() -> str | None:
    query = "--query-gpu=clocks.sm,clocks.mem,clocks.max.sm,power.limit"
    try:
        done = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return done.stdout.strip() or None


def ceilings(meter: Meter, size: int, copy_bytes: int, dtype: torch.dtype) -> dict[str, float | None]:
    """What this device reaches in this run: TFLOP/s of square matrix products, GB/s of a copy (read and write)."""
    device = meter.device
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    flops = 2 * size**3
    found: dict[str, float | None] = {"matmul": flops / meter.kernel(lambda: a @ b) / 1e12, "fp8": None, "int8": None}
    if meter.cuda:
        found["fp8"] = _optional(meter, flops, _fp8(a, b))
        found["int8"] = _optional(meter, flops, _int8(size, device))
    source = torch.zeros(copy_bytes, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    found["copy"] = 2 * copy_bytes / meter.kernel(lambda: target.copy_(source)) / 1e9
    return found


def _optional(meter: Meter, flops: int, run: Run) -> float | None:
    try:
        return flops / meter.kernel(run) / 1e12
    except RuntimeError:  # a device without the type
        return None


def _fp8(a: Tensor, b: Tensor) -> Run:
    ones = torch.ones(a.shape[0], 1, device=a.device)

    def run() -> Tensor:
        return torch._scaled_mm(x, y.T, scale_a=ones, scale_b=ones.T, out_dtype=torch.bfloat16)

    x, y = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
    return run


def _int8(size: int, device: torch.device) -> Run:
    x, y = (torch.randint(-99, 99, (size, size), dtype=torch.int8, device=device) for _ in range(2))
    return lambda: torch._int_mm(x, y.T)


@dataclass
class Record:
    """What a run found, section by section, and what went wrong."""

    data: dict[str, Any] = field(default_factory=dict)

    def section(self, meter: Meter, name: str, needed: float, run: Callable[[], Any]) -> Any:
        """Runs a section if `needed` seconds are left. One that fails is recorded; the others go on."""
        if meter.left() < needed:
            self.data[name] = {"skipped": f"{needed:.0f} s needed, {max(meter.left(), 0):.0f} s left"}
            return None
        began = time.perf_counter()
        try:
            self.data[name] = run()
        except Exception as error:  # noqa: BLE001  # minutes on a borrowed GPU: the other sections must still run
            self.data[name] = {"failed": f"{type(error).__name__}: {str(error)[:500]}"}
        meter.wait()
        if isinstance(self.data[name], dict):
            self.data[name]["wall_s"] = round(time.perf_counter() - began, 3)
        return self.data[name]


def ratio(value: float | None, base: float | None) -> float | None:
    """value / base where both are known."""
    return value / base if value and base else None


def relative_error(found: Tensor, exact: Tensor) -> float:
    """‖found − exact‖ / ‖exact‖ in float64."""
    found, exact = found.double(), exact.double()
    return float((found - exact).norm() / exact.norm())


def joined(values: Sequence[str]) -> str:
    """A Markdown table row."""
    return "| " + " | ".join(values) + " |"
