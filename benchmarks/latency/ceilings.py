"""What a device reaches in the run that measures a model: the ceilings that its floors rest on."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

_LARGEST = 2**30
_SIDES = {"cpu": (512, 1536), "cuda": (8192,)}
_SECONDS = 0.5  # of each measurement: long enough that a busy machine has a quiet moment in it


def measured_ceilings(device: str, dtype: str, weights: int) -> dict[str, Any]:
    """TFLOP/s of a square matrix product in dtype and GB/s of a copy, the best of a few: a floor must lie below.

    device: as a backend names it. weights: bytes of the smallest weights that a stage streams; what is copied is as
    large (1 GiB at most), so that caches help the copy as they help the stage. With torch where it is installed, numpy
    elsewhere. Returns {} where neither can (a GPU without torch, a type without products).
    """
    kind = device.partition(":")[0]
    size = int(np.clip(weights, 2**20, _LARGEST))
    try:
        import torch
    except ImportError:
        return _with_numpy(size) if kind == "cpu" and dtype == "float32" else {}
    if kind not in _SIDES or (kind == "cuda" and not torch.cuda.is_available()):
        return {}
    where = torch.device(device)

    def wait() -> None:
        if kind == "cuda":
            torch.cuda.synchronize(where)

    def product(side: int) -> Callable[[], Any]:
        a, b = (torch.randn(side, side, device=where).to(getattr(torch, dtype)) for _ in range(2))
        return lambda: a @ b

    source = torch.zeros(size, dtype=torch.int8, device=where)
    target = torch.empty_like(source)
    flops = max(2 * side**3 / _best(product(side), wait) for side in _SIDES[kind])
    threads = f", {torch.get_num_threads()} threads" if kind == "cpu" else ""
    return _record(flops, size, _best(lambda: target.copy_(source), wait), f"torch{threads}")


def _with_numpy(size: int) -> dict[str, Any]:
    def product(side: int) -> Callable[[], Any]:
        a, b = (np.random.default_rng(i).standard_normal((side, side), dtype=np.float32) for i in range(2))
        return lambda: a @ b

    source, target = np.zeros(size, np.int8), np.empty(size, np.int8)
    flops = max(2 * side**3 / _best(product(side)) for side in _SIDES["cpu"])
    return _record(flops, size, _best(lambda: np.copyto(target, source)), "numpy")


def _record(flops: float, size: int, copy: float, how: str) -> dict[str, Any]:
    return {
        "gemm_tflops": round(flops / 1e12, 4),
        "copy_gbps": round(2 * size / copy / 1e9, 2),  # read and written
        "copy_bytes": size,
        "with": how,
    }


def _best(run: Callable[[], Any], wait: Callable[[], None] = lambda: None) -> float:
    """Seconds of the fastest run; the first, which may build something, is one of them."""
    found: list[float] = []
    end = time.perf_counter() + _SECONDS
    while len(found) < 3 or time.perf_counter() < end:
        wait()
        began = time.perf_counter()
        run()
        wait()
        found.append(time.perf_counter() - began)
    return min(found)
