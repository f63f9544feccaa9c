"""What a device reaches in the run that measures a model: the ceilings that its floors rest on."""

from __future__ import annotations

from typing import Any

import numpy as np

from mindomni_rt.memory.speed import cpu_rates

_SIDES = {"cpu": (512, 1536), "cuda": (8192,)}
_SECONDS = 0.5  # of each measurement


def measured_ceilings(device: str, dtype: str, weights: int) -> dict[str, Any]:
    """TFLOP/s of a square matrix product in dtype and GB/s of a copy, the best of a few: a floor must lie below.

    device: as a backend names it. weights: bytes of the smallest weights that a stage streams; what is copied is as
    large (1 GiB at most), so that caches help the copy as they help the stage. With torch where it is installed, numpy
    elsewhere. Returns {} where neither can (a GPU without torch, a type without products).
    """
    kind, size = device.partition(":")[0], int(np.clip(weights, 2**20, 2**30))
    try:
        import torch

        from ..measure import Meter, ceilings
    except ImportError:
        if kind != "cpu" or dtype != "float32":
            return {}
        (product, copy), how = cpu_rates(size), "numpy"
    else:
        if kind not in _SIDES or (kind == "cuda" and not torch.cuda.is_available()):
            return {}
        found = ceilings(Meter(torch.device(device)), getattr(torch, dtype), _SIDES[kind], size, _SECONDS)
        product, copy = found["matmul"] or 0.0, found["copy"] or 0.0
        how = f"torch, {torch.get_num_threads()} threads" if kind == "cpu" else "torch"
    return {"gemm_tflops": round(product, 4), "copy_gbps": round(copy, 2), "copy_bytes": size, "with": how}
