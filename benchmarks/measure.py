"""Clocks: how long work takes on a device; how far a result is from an exact one; a run's record."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from mindomni_rt.errors import MissingExtraError
from mindomni_rt.extras import install
from mindomni_rt.judgement import described

from .machine import device_peak

Run = Callable[[], Any]
FLUSH = 512 << 20  # bytes written between runs: more than any L2
PEERS = ("transformers", "diffusers", "onnxruntime")


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
        """Seconds until the part must end."""
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
            with torch.inference_mode(False):  # else it could not be written outside of that mode again
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

    def peak(self) -> dict[str, int]:
        """Bytes since `restart`, at most: allocated, and reserved by torch's pools, graphs' among them. 0 on a CPU."""
        return device_peak(self.device) or {"peak_bytes": 0, "reserved_bytes": 0}

    def restart(self) -> None:
        """Forgets the peak."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.device)


def relative_error(found: Tensor, exact: Tensor) -> float:
    """‖found - exact‖ / ‖exact‖ in float64."""
    found, exact = found.double(), exact.double()
    return float((found - exact).norm() / exact.norm())


@dataclass
class Record:
    """What a run found, part by part, and what went wrong. `store` is called after each part."""

    data: dict[str, Any] = field(default_factory=dict)
    store: Callable[[], None] = lambda: None

    def section(self, meter: Meter, name: str, needed: float, run: Callable[[], Any], limit: float = math.inf) -> Any:
        """Runs a part if `needed` seconds are left, for `limit` seconds at most. A failure is recorded, not raised."""
        end, left = meter.deadline, meter.left()
        if left < needed:
            self.data[name] = {"skipped": f"{needed:.0f} s needed, {max(left, 0):.0f} s left"}
            return None
        began = time.perf_counter()
        meter.deadline = min(end, began + limit)
        try:
            with stopped_after(meter.left()):
                self.data[name] = run()
                meter.wait()
        except Exception as error:  # noqa: BLE001  # minutes on a borrowed GPU: the other parts must still run
            # What a part stored before it failed is kept.
            self.data[name] = {**(self.data.get(name) or {}), **_why(error)}
        finally:
            meter.deadline = end
        if isinstance(self.data[name], dict):
            self.data[name]["wall_s"] = round(time.perf_counter() - began, 3)
        self.store()
        return self.data[name]


@contextlib.contextmanager
def stopped_after(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in a block that takes longer. Needs POSIX signals and the main thread; else no limit."""
    main = threading.current_thread() is threading.main_thread()
    if seconds == math.inf or not main or not hasattr(signal, "SIGALRM"):
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeoutError(f"stopped after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _why(error: Exception) -> dict[str, str]:
    """Why a part found nothing: a peer that is not installed is "missing", all else "failed"."""
    module = (error.name or "").partition(".")[0] if isinstance(error, ImportError) else ""
    if module in PEERS or isinstance(error, MissingExtraError):
        return {"missing": f"not installed: {install('bench')}"}
    return {"failed": described(error)}


def ceilings(
    meter: Meter, dtype: torch.dtype, sides: Sequence[int], copied: int, seconds: float = 0.0
) -> dict[str, float | None]:
    """What this device reaches in this run: TFLOP/s of square matrix products, GB/s of a copy (read and write).

    Each is the best of at least three runs and of all that fit into `seconds`: a floor must lie below, and a busy
    machine has a quiet moment in a longer while. copied: bytes. fp8 and int8 are None where a device lacks the type.
    """

    def best(run: Run) -> float:
        found, end = list[float](), time.perf_counter() + seconds
        while len(found) < 3 or time.perf_counter() < end:
            found.append(meter.once(run)[0])
        return min(found)

    def square(side: int) -> Iterator[Tensor]:
        return (torch.randn(side, side, device=meter.device).to(dtype) for _ in range(2))

    source = torch.zeros(copied, dtype=torch.int8, device=meter.device)
    target = torch.empty_like(source)
    found: dict[str, float | None] = {
        "matmul": max(2 * side**3 / best(partial(torch.matmul, *square(side))) for side in sides) / 1e12,
        "copy": 2 * copied / best(lambda: target.copy_(source)) / 1e9,
    }
    for name in ("fp8", "int8"):
        try:
            found[name] = 2 * sides[-1] ** 3 / best(_eight_bit(name, *square(sides[-1]))) / 1e12 if meter.cuda else None
        except (RuntimeError, ValueError):  # a device without the type
            found[name] = None
    return found


def _eight_bit(kind: str, a: Tensor, b: Tensor) -> Run:
    if kind == "int8":
        x, y = (torch.randint(-99, 99, a.shape, dtype=torch.int8, device=a.device) for _ in range(2))
        return lambda: torch._int_mm(x, y.T)
    x, y, ones = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn), torch.ones(a.shape[0], 1, device=a.device)
    return lambda: torch._scaled_mm(x, y.T, scale_a=ones, scale_b=ones.T, out_dtype=torch.bfloat16)
