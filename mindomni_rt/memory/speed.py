"""How long a request would take: the cost model's prediction.

Nothing is measured but this CPU's copy bandwidth and its rate of matrix products, for a fraction of a second.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..checkpoint.config import ModelConfig
from ..devices.table import PEAKS, Device, load_devices
from .layers import Workload
from .roofline import bound

# Of the copy bandwidth, what decoding on a CPU reaches; measured once, on two cores with bfloat16 products.
_CPU_DECODING = 0.33
_SCHEMES = {
    "float32": "fp32",
    "float16": "bf16",
    "bfloat16": "bf16",
    "int8": "w8a8",
    "fp8": "w8a8",
    "fp8fast": "w8a8",
    "int4": "w4a16",
}


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
    rate, bandwidth = cpu_rates()
    peaks = dict.fromkeys(PEAKS, rate)
    here = Device(key="here", name="this CPU", memory=1.0, bandwidth=bandwidth, peak=peaks, source="measured now")
    efficiency = {"gemm16": 1.0, "gemm8": 1.0, "gemm4": 1.0, "memory": _CPU_DECODING}
    return _speed(config, here, kind, efficiency, side, steps)


def predict_gpu(config: ModelConfig, kind: str, name: str, side: int = 1024, steps: int = 50) -> Speed | None:
    """A request on a GPU of the device table; None for one that it lacks."""
    sheet = load_devices()
    device = sheet.named(name)
    if device is None or device.missing:
        return None
    return _speed(config, device, kind, sheet.efficiency, side, steps)


def _speed(
    config: ModelConfig, device: Device, kind: str, efficiency: Mapping[str, float], side: int, steps: int
) -> Speed | None:
    work = Workload(height=side, width=side, steps=steps)
    found = bound(config, work, device, _SCHEMES.get(kind, "bf16"), efficiency)
    if found is None:
        return None
    stages = found.prediction
    return Speed(
        width=side,
        height=side,
        steps=steps,
        new_tokens=work.new_tokens,
        total=found.prediction_total,
        token=stages["language"] / work.new_tokens,
        step=stages["denoiser"] / steps,
    )


def cpu_rates(copied: int = 1 << 26) -> tuple[float, float]:
    """(TFLOP/s of float32 products, GB/s read and written by a copy of so many bytes), the best of three short tries
    each."""
    side = 1024
    a, b = np.ones((side, side), np.float32), np.ones((side, side), np.float32)
    source, target = np.ones(copied // 4, np.float32), np.empty(copied // 4, np.float32)
    product = min(_seconds(lambda: a @ b) for _ in range(3))
    copy = min(_seconds(lambda: np.copyto(target, source)) for _ in range(3))
    return 2 * side**3 / product / 1e12, 2 * source.nbytes / copy / 1e9


def _seconds(run: Any) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
