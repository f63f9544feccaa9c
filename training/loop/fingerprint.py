"""What a run may not change when it resumes: its settings and the weights that it started from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import Config
from ..stages.base import Stage, base_digest

# Where files lie, what is logged and kept, and what changes speed or memory alone.
_FREE = frozenset(
    {
        "model", "out", "device", "precision", "save_every", "keep", "log_every", "recompute", "evaluate_every",
        "evaluate_count", "data.validation", "data.cache_latents", "rgpo.dump_every", "optim.steps",
    }
)  # fmt: skip
_TABLES = {
    "prior": ("prior",),
    "lora": ("sft", "rgpo"),
    "distill": ("pretrain", "sft"),
    "sft": ("sft",),
    "rgpo": ("rgpo",),
}
_SHOWN = 4  # differences named in a message


def fingerprint(config: Config, stage: Stage) -> dict[str, Any]:
    """Every setting that decides the result, by name, and a checksum of each part of the base model.

    Taken before training changes a weight. `optim.steps` counts only where the schedule depends on it.
    """
    tables = {k: v for k, v in config.to_dict().items() if config.stage in _TABLES.get(k, (config.stage,))}
    settings = {k: v for k, v in _flat(tables).items() if k not in _FREE}
    settings["precision"] = "bf16" if config.wants_bf16(stage.contexts.device.type) else "fp32"
    if config.optim.schedule != "constant":
        settings["optim.steps"] = config.optim.steps
    return settings | {f"base weights of {part}": value for part, value in base_digest(stage.model).items()}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two fingerprints, in words; empty where nothing does."""
    names = [n for n in {**before, **now} if before.get(n) != now.get(n)]
    shown = [
        f"{n} differ" if n.startswith("base weights") else f"{n} was {before.get(n)!r}, is {now.get(n)!r}"
        for n in names[:_SHOWN]
    ]
    return [*shown, f"{len(names) - _SHOWN} more"] if len(names) > _SHOWN else shown


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            out |= _flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return out
