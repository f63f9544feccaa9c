"""What the planner promises for the requests that ran, with the parts kept that `load` keeps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from mindomni_rt.checkpoint.config import ModelConfig
from mindomni_rt.memory.footprint import Precision, stage_memory, weight_bytes
from mindomni_rt.memory.layers import PART_OF, Workload
from mindomni_rt.memory.planner import parse_bytes, plan
from mindomni_rt.memory.precision import parse_precision, plain_vae, split_attention


def chosen(
    config: ModelConfig, dtype: str, precision: str | None, budget: str | None, reserve: int
) -> tuple[Precision, tuple[str, ...]]:
    """(precision, parts that stay) of a load on a GPU. Raises OutOfMemoryError."""
    text, _ = split_attention(precision)
    wanted = parse_precision(text, dtype, plain_vae(dtype, "cuda")) if text else None
    if wanted is None and (budget is None or dtype != "bfloat16"):
        wanted = replace(Precision.uniform(dtype), vae="bfloat16" if dtype == "bfloat16" else "float32")
    found = plan(
        config,
        Workload(joint=True),
        precision=wanted,
        budget=parse_bytes(budget) if budget else None,
        reserve=reserve if budget else 0,
    )
    return found.precision, found.resident


def peak(config: ModelConfig, precision: Precision, resident: Iterable[str], work: dict[str, Any]) -> int:
    """Bytes of a request, the reserve left out."""
    weights = weight_bytes(config, precision)
    kept, sizes = set(resident), Workload(**{**work, "patches": tuple(work["patches"])})
    base = sum(weights[part] for part in kept)
    return max(
        base + (0 if PART_OF[s.stage] in kept else s.weights) + s.state + s.activations
        for s in stage_memory(config, sizes, precision)
        if s.stage != "vision" or sizes.patches[0]
    )
