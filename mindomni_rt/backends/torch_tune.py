"""Which product one row takes on a CUDA device: the library's or ours, measured once for each shape."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import torch

from .torch_products import Dense

logger = logging.getLogger(__name__)
RUNS = 20


def milliseconds(run: Callable[[], object]) -> float:
    """Median milliseconds of one call, by the device's clock."""
    run()
    times = []
    for _ in range(RUNS):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        run()
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended))
    return sorted(times)[RUNS // 2]


def choose_one_row(products: Iterable[Dense], clock: Callable[[Callable[[], object]], float] = milliseconds) -> None:
    """Sets `one_row` of each product to the faster of "library" and "gemv" for its shape; the log tells both times."""
    best: dict[tuple[int, int, bool], str] = {}
    for product in products:
        n, k = product.weight.shape
        key = (n, k, product.bias is not None)
        if key not in best:
            x = torch.randn(1, k, dtype=product.weight.dtype, device=product.weight.device)
            times = {}
            for name in ("library", "gemv"):
                product.one_row = name
                times[name] = clock(lambda product=product, x=x: product(x))  # type: ignore[misc]
            best[key] = min(times, key=lambda name: times[name])
            logger.info(
                "one row of %dx%d: %s (%s)", n, k, best[key], ", ".join(f"{a} {t:.4f} ms" for a, t in times.items())
            )
        product.one_row = best[key]
