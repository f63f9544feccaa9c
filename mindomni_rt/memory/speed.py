"""How long a request would take: the cost model's prediction, where the benchmarks are installed.

Nothing is measured but this CPU's copy bandwidth and its rate of matrix products, for a fraction of a second.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np

from ..checkpoint.config import ModelConfig
from ..devices.table import Device, load_devices
from .layers import Workload

# Of the copy bandwidth, what decoding on a CPU reaches; measured once, on two cores with bfloat16 products.
_CPU_DECODING = 0.33
_SCHEMES = {"float32": "fp32", "float16": "bf16", "bfloat16": "bf16", "int8": "w8a8", "fp8": "w8a8", "int4": "w4a16"}


@dataclass(frozen=True, kw_only=True)
class Speed:
    """A prediction in seconds: of the whole request, of one written token and of one guided step."""

    width: int
    height: int
    steps: int
    new_tokens: int
    total: float
    token: float
    step: float

    def __str__(self) -> str:
        return (
            f"{self.total:.3g} s for {self.width}x{self.height}, {self.steps} steps and {self.new_tokens} tokens "
            f"({self.token:.2g} s a token, {self.step:.2g} s a step)"
        )


def predict_cpu(config: ModelConfig, kind: str, side: int = 512, steps: int = 20) -> Speed | None:
    """A request of side² pixels on this CPU with weights of a kind ("float32", "bfloat16", "int8", "int4")."""
    cost = _cost_model()
    if cost is None:
        return None
    roofline, device, _ = cost
    rate, bandwidth = cpu_rates()
    peaks = dict.fromkeys(("fp32", "bf16", "fp8", "int8", "fp4", "int4"), rate)
    here = device(key="here", name="this CPU", memory=1.0, bandwidth=bandwidth, peak=peaks, source="measured now")
    efficiency = {"gemm16": 1.0, "gemm8": 1.0, "gemm4": 1.0, "memory": _CPU_DECODING}
    return _speed(roofline, config, here, kind, efficiency, side, steps)


def predict_gpu(config: ModelConfig, kind: str, name: str, side: int = 1024, steps: int = 50) -> Speed | None:
    """A request on a GPU of the device table; None for one that it lacks."""
    cost = _cost_model()
    if cost is None:
        return None
    roofline, _, sheet = cost
    device = sheet.named(name)
    if device is None or not device.bandwidth or not device.peak:
        return None
    return _speed(roofline, config, device, kind, sheet.efficiency, side, steps)


def _cost_model() -> tuple[Any, Any, Any] | None:
    """(roofline, kind of device, device sheet). Imported by name: the runtime does not depend on the benchmarks."""
    try:
        return import_module("mindomni_rt.benchmarks.roofline.command"), Device, load_devices()
    except ImportError:
        return None


def _speed(
    roofline: Any, config: ModelConfig, device: Any, kind: str, efficiency: Any, side: int, steps: int
) -> Speed | None:
    work = Workload(height=side, width=side, steps=steps)
    bound = roofline.bound(config, work, device, _SCHEMES.get(kind, "bf16"), efficiency)
    if bound is None:
        return None
    found = bound.prediction
    return Speed(
        width=side,
        height=side,
        steps=steps,
        new_tokens=work.new_tokens,
        total=sum(found.values()),
        token=found["language"] / work.new_tokens,
        step=found["denoiser"] / steps,
    )


def cpu_rates() -> tuple[float, float]:
    """(TFLOP/s of float32 products, GB/s read and written by a copy), the best of three short tries each."""
    side, size = 1024, 1 << 24
    a, b = np.ones((side, side), np.float32), np.ones((side, side), np.float32)
    source, target = np.ones(size, np.float32), np.empty(size, np.float32)
    product = min(_seconds(lambda: a @ b) for _ in range(3))
    copy = min(_seconds(lambda: np.copyto(target, source)) for _ in range(3))
    return 2 * side**3 / product / 1e12, 2 * source.nbytes / copy / 1e9


def _seconds(run: Any) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
