"""Which kernel computes each linear layer on a CUDA device, cuBLAS's or ours: measured once for each shape.

Work is timed as it will run, inside a CUDA graph: a launch from Python costs more than a product of one row. All layers
of a shape are timed together, so that no weight is still in the L2 cache when its turn comes again.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import TypeVar

import torch

from mindomni_rt.kernels.triton_compat import REFUSALS

from ...errors import UnsupportedDeviceError
from . import timings
from .graph import captured
from .linear import LinearDense, LinearW8A8
from .stack import FastBlock, FastStack

logger = logging.getLogger(__name__)
RUNS = 7
Clock = Callable[[Callable[[], object]], float]
P = TypeVar("P", LinearDense, LinearW8A8)


def milliseconds(run: Callable[[], object]) -> float:
    """Median milliseconds of `run` replayed as a CUDA graph on the current device."""
    graph = captured(run, torch.cuda.current_device())
    times = []
    for _ in range(RUNS + 1):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended))
    return median(times[1:])


def _fastest(
    group: Sequence[P],
    label: str,
    names: Sequence[str],
    choose: Callable[[P, str], None],
    x: torch.Tensor,
    clock: Clock,
) -> None:
    """Sets every layer of one shape to the fastest of `names`, and logs all times."""

    def all_of_them() -> None:
        for product in group:
            product(x)

    times = timings.known(x.device, f"{label} {x.dtype}") or {}
    for name in () if times else names:
        for product in group:
            choose(product, name)
        try:
            times[name] = clock(all_of_them) / len(group)
        except REFUSALS as error:
            logger.info("%s: %s does not run: %s", label, name, str(error).split("\n")[0])
    timings.keep(x.device, f"{label} {x.dtype}", times)
    if not times:
        raise UnsupportedDeviceError(f"no kernel for {label} runs on {x.device}; load without this precision")
    best = min(times, key=lambda name: times[name])
    for product in group:
        choose(product, best)
    logger.info("%s: %s (%s)", label, best, ", ".join(f"{name} {t:.4f} ms" for name, t in times.items()))


def _rows(rows: int, width: int, like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Random rows where `like` is. Its own generator: a failed capture leaves the device's default one unusable."""
    generator = torch.Generator(like.device).manual_seed(0)
    return torch.randn(rows, width, dtype=dtype or like.dtype, device=like.device, generator=generator)


def choose_one_row(products: Iterable[LinearDense], clock: Clock = milliseconds) -> None:
    """Sets `one_row` of each layer to the faster of "cublas" and "gemv" for its shape."""
    groups: dict[tuple[int, int, bool], list[LinearDense]] = defaultdict(list)
    for product in products:
        groups[product.weight.shape[0], product.weight.shape[1], product.bias is not None].append(product)

    def choose(product: LinearDense, name: str) -> None:
        product.one_row = name

    for (n, k, _), group in groups.items():
        weight = group[0].weight
        x = _rows(1, k, weight)
        _fastest(group, f"one row of {n}x{k}", ("cublas", "gemv"), choose, x, clock)


def choose_w8a8(products: Iterable[LinearW8A8], rows: int, clock: Clock = milliseconds) -> None:
    """Sets `how` of each W8A8 layer to the faster of "cublas" and "triton" for `rows` rows of its shape.

    A kernel that does not run on this device is skipped. Raises UnsupportedDeviceError when neither does.
    """
    groups: dict[tuple[int, int], list[LinearW8A8]] = defaultdict(list)
    for product in products:
        groups[product.values.shape[0], product.values.shape[1]].append(product)

    def choose(product: LinearW8A8, name: str) -> None:
        product.how = name

    for (n, k), group in groups.items():
        x = _rows(rows, k, group[0].values, group[0].dtype)
        few = group[:4]  # bound by arithmetic, not by reading the weight
        kind = f"{few[0].rows}{' fast' * few[0].fast}"
        _fastest(few, f"{kind} rows of {n}x{k}", ("cublas", "triton"), choose, x, clock)
        for product in group[4:]:
            product.how = few[0].how


def choose_fused_rows(stack: FastStack, clock: Clock = milliseconds) -> None:
    """Sets `fused_rows` of a stack to whether norm, linear layer and gate of one row are faster fused."""
    blocks = [block for block in stack.blocks if isinstance(block, FastBlock)]
    if any(p.row_weight() is None for block in blocks for p in (block.qkv, block.gate_up)):
        return
    like = blocks[0].norm1
    x = _rows(1, stack.config.hidden_size, like)
    label = f"norm and product of one row, {stack.stored} {like.dtype}, {stack.config}"
    times = timings.known(x.device, label) or {}
    for name in () if times else ("apart", "fused"):

        def halves(fused: bool = name == "fused") -> None:
            for block in blocks:
                stack.normed(block.qkv, x, block.norm1, block.eps, x, fused)
                stack.gated(block, x, x, fused)

        try:
            times[name] = clock(halves) / len(blocks)
        except REFUSALS as error:
            logger.info("the fused kernel for one row does not run: %s", str(error).split("\n")[0])
    timings.keep(x.device, label, times)
    stack.fused_rows = times.get("fused", float("inf")) < times["apart"]
    measured = ", ".join(f"{name} {t:.4f} ms" for name, t in times.items())
    logger.info("norm, linear layer and gate of one row: %s (%s)", "fused" if stack.fused_rows else "apart", measured)
