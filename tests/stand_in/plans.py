"""What the planner promises for the requests that ran, with the parts kept that `load` keeps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mindomni_rt.checkpoint.config import ModelConfig
from mindomni_rt.memory.footprint import Precision, stage_memory
from mindomni_rt.memory.layers import BUDGETED, Workload
from mindomni_rt.memory.planner import Plan, block_bytes, blocks_ahead, parse_bytes, plan, schedule_of
from mindomni_rt.memory.precision import parse_precision, plain_vae, split_attention


def chosen(config: ModelConfig, dtype: str, precision: str | None, budget: str | None, reserve: int) -> Plan:
    """Of a load on a GPU. Raises OutOfMemoryError."""
    text, _ = split_attention(precision)
    wanted = parse_precision(text, dtype, plain_vae(dtype, "cuda")) if text else None
    if wanted is None and (budget is None or dtype != "bfloat16"):
        wanted = replace(Precision.uniform(dtype), vae="bfloat16" if dtype == "bfloat16" else "float32")
    return plan(
        config,
        BUDGETED,
        precision=wanted,
        budget=parse_bytes(budget) if budget else None,
        reserve=reserve if budget else 0,
    )


def peak(config: ModelConfig, found: Plan, work: dict[str, Any]) -> int:
    """Bytes of a request, the reserve left out."""
    sizes = Workload(**{name: tuple(value) if isinstance(value, list) else value for name, value in work.items()})
    hidden = blocks_ahead(config, sizes, found) * block_bytes(config, found.precision)
    stages = stage_memory(config, sizes, found.precision, parked=found.budget is None)
    return max(move.peak for move in schedule_of(stages, sizes, found.resident, 0, hidden))
