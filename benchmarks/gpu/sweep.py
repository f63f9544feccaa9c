"""`gpu_suite --sweep`: times every tile of a space on this device, to fill the launch tables with measurements."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor

from mindomni_rt.checkpoint.config import ModelConfig
from mindomni_rt.kernels.gemv import gemv
from mindomni_rt.kernels.int4_linear import int4_linear, quantize_int4
from mindomni_rt.kernels.launch import SHARED_LIMIT, Launch
from mindomni_rt.kernels.linear8 import linear8, quantize_weight
from mindomni_rt.kernels.quantize import quantize_rows
from mindomni_rt.kernels.segment_attention import segment_attention
from mindomni_rt.kernels.triton_compat import REFUSALS

from .kernels import Sizes
from .measure import Meter

Launched = Callable[[Launch], Tensor]


def space(rows: tuple[int, ...], columns: tuple[int, ...], warps: tuple[int, ...], stages: tuple[int, ...]) -> Any:
    """All launches of the given choices."""
    return [Launch(block_m=m, block_n=n, warps=w, stages=s) for m, n, w, s in product(rows, columns, warps, stages)]


def kernels(config: ModelConfig, sizes: Sizes, device: torch.device) -> Iterator[tuple[str, Launched, list[Launch]]]:
    """(name, launcher, launches to try) of the kernels that decide the whole."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator).to(sizes.dtype)

    decoder, language = config.decoder.stack, config.language.stack
    heads, d, n = decoder.num_heads, decoder.head_dim, sizes.tokens
    q, k, v = (draw(2, heads, n, d) for _ in range(3))
    keys, values, tk, tv = (draw(2, heads, *s, d) for s in ((max(sizes.lengths),), (max(sizes.lengths),), (), ()))
    lengths = torch.tensor(sizes.lengths, dtype=torch.int32, device=device)
    yield (
        "segment_attention",
        lambda launch: segment_attention(q, (keys, values), (tk, tv), (k, v), lengths, launch=launch),
        space((64, 128), (32, 64, 128), (4, 8), (2, 3, 4)),
    )
    x, weight = (
        quantize_rows(draw(n, decoder.hidden_size), "int8"),
        draw(2 * decoder.intermediate_size, decoder.hidden_size),
    )
    eight = quantize_weight(weight, "int8")
    yield (
        "linear8_int8",
        lambda launch: linear8(x, eight, sizes.dtype, launch=launch),
        space((64, 128), (64, 128, 256), (4, 8), (2, 3, 4)),
    )
    row, wide = draw(1, language.hidden_size), draw(2 * language.intermediate_size, language.hidden_size)
    yield (
        "gemv",
        lambda launch: gemv(row, wide, launch=launch),
        space((1, 2, 4, 8), (512, 1024, 2048), (2, 4, 8), (2, 4)),
    )
    four = quantize_int4(wide)
    yield (
        "int4_gemv",
        lambda launch: int4_linear(row, four, launch=launch),
        space((4, 8, 16), (4, 8, 16), (2, 4, 8), (2, 4)),
    )


def sweep(config: ModelConfig, sizes: Sizes, meter: Meter, most: int | None = None) -> dict[str, Any]:
    """The ten fastest launches of each kernel in seconds, and how many did not run. most: launches of each to try."""
    found: dict[str, Any] = {}
    for name, run, launches in kernels(config, sizes, meter.device):
        times: list[tuple[float, dict[str, int]]] = []
        refused = 0
        for launch in launches[:most]:
            if meter.left() < 30:
                break
            try:
                seconds = meter.kernel(lambda launch=launch, run=run: run(launch))  # type: ignore[misc]
            except REFUSALS:
                refused += 1
                continue
            times.append((seconds, vars(launch)))
        times.sort(key=lambda pair: pair[0])
        found[name] = {"best": [{"seconds": s, **launch} for s, launch in times[:10]], "refused": refused}
    return {**found, "shared_limits": dict(SHARED_LIMIT)}
