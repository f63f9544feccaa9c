"""Which products a CUDA device takes: the library's or ours, measured once for each shape."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import torch

from kernels.language import REFUSALS

from ..errors import UnsupportedDeviceError
from .torch_products import Dense, EightBit

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


def choose_eight_bit(
    products: Iterable[EightBit], rows: int, clock: Callable[[Callable[[], object]], float] = milliseconds
) -> None:
    """Sets `how` of each 8-bit product to the faster of "library" and "triton" for `rows` rows of its shape.

    One that does not run on this device is left out. Raises UnsupportedDeviceError when neither does.
    """
    best: dict[tuple[int, int], str] = {}
    for product in products:
        n, k = product.values.shape
        if (n, k) not in best:
            x = torch.randn(rows, k, dtype=product.dtype, device=product.values.device)
            times = {}
            for name in ("library", "triton"):
                product.how = name
                try:
                    times[name] = clock(lambda product=product, x=x: product(x))  # type: ignore[misc]
                except REFUSALS as error:
                    logger.info("%s %s of %dx%d does not run: %s", name, product.rows, n, k, str(error).split("\n")[0])
            if not times:
                raise UnsupportedDeviceError(f"no {product.rows} product runs on {product.values.device}; use bfloat16")
            best[n, k] = min(times, key=lambda name: times[name])
            measured = ", ".join(f"{a} {t:.3f} ms" for a, t in times.items())
            logger.info("%s rows of %dx%d: %s (%s)", product.rows, n, k, best[n, k], measured)
        product.how = best[n, k]
