"""What the planner promises for the requests that ran, with the parts kept that `load` keeps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from mindomni_rt.checkpoint.config import ModelConfig
from mindomni_rt.memory.footprint import Precision, stage_memory
from mindomni_rt.memory.layers import Workload
from mindomni_rt.memory.planner import parse_bytes, plan, schedule_of
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
    sizes = Workload(**{**work, "patches": tuple(work["patches"])})
    return max(move.peak for move in schedule_of(stage_memory(config, sizes, precision), sizes, tuple(resident), 0))
