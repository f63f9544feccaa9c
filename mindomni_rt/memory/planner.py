"""Will it fit? What to keep loaded within a memory budget, and what to swap between stages.

`load(..., memory_budget=)`, `export plan` and `benchmarks plan` share it. Weights move between stages and never inside
one: streaming them in every denoising step would cost more than the step. Where the budget leaves room beside the
language model, the fast path uploads blocks of the decoder while text is written: those bytes are moved as well, but
nothing waits for them.
"""

from __future__ import annotations

import numbers
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from ..checkpoint.config import ModelConfig
from ..checks import shown
from ..errors import BadRequestError, OutOfMemoryError
from ..stages import PART_OF, PARTS
from .footprint import StageMemory, stage_memory
from .layers import Workload
from .precision import BITS, COMPUTE, Precision

# From the most exact to the smallest; a refusal names the first that fits.
LADDER = (
    Precision(),
    Precision(vae="bfloat16"),
    Precision(language="int8wo", head="int8wo", vae="bfloat16"),
    Precision(language="int8wo", head="int8wo", decoder="int8", vae="bfloat16"),
    Precision(language="int4", head="int8wo", decoder="int8", vae="bfloat16"),
    Precision(language="int4", head="int8wo", decoder="int4", vae="bfloat16"),
)
BESIDE = ("language", "connector")
"""Stages that run while blocks of the decoder arrive, or after that and before the decoder does."""
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True, kw_only=True)
class Move:
    """Before a stage: parts to drop, then parts to load. peak: bytes in use at most while the stage runs, those that
    arrive meanwhile included."""

    stage: str
    drop: tuple[str, ...]
    load: tuple[str, ...]
    peak: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Where every byte goes. resident: parts that stay loaded across requests; schedule: the stages of one request;
    hidden: of the bytes `moved`, those that are uploaded while text is written."""

    precision: Precision
    work: Workload
    stages: tuple[StageMemory, ...]
    schedule: tuple[Move, ...]
    resident: tuple[str, ...]
    reserve: int
    budget: int | None = None
    hidden: int = 0

    @property
    def peak(self) -> int:
        """Bytes in use at most, the reserve included."""
        return max(move.peak for move in self.schedule)

    @property
    def moved(self) -> int:
        """Bytes of weights loaded in each request; 0 when everything stays."""
        weights = {PART_OF[s.stage]: s.weights for s in self.stages}
        return sum(weights[part] for move in self.schedule for part in move.load)

    def summary(self) -> str:
        """One line."""
        kept = f"swaps {gigabytes(self.moved)} a request, {self.behind()}" if self.moved else "everything stays loaded"
        return f"peak {gigabytes(self.peak)}, {kept}; {self.precision}"

    def behind(self) -> str:
        """How much of what moves is hidden, in words."""
        return f"{gigabytes(self.hidden) if self.hidden else 'none'} of it while text is written"

    def to_dict(self) -> dict[str, Any]:
        """Plain data: the choice, its peak and the bytes of weights that a request moves."""
        return {
            "precision": str(self.precision),
            "resident": list(self.resident),
            "peak": self.peak,
            "moved_bytes": self.moved,
            "hidden_bytes": self.hidden,
        }


def gigabytes(count: float) -> str:
    """Bytes as decimal GB."""
    return f"{count / 1e9:.2f} GB"


def _digits(value: str | float) -> str:
    return value if isinstance(value, str) else shown(value)  # Python prints no integer of 5,000 digits


def parse_bytes(text: str | float) -> int:
    """Bytes of "8GB", "7.5 GiB", "800MB" or a number of bytes. Raises BadRequestError."""
    plain = isinstance(text, str | numbers.Real) and not isinstance(text, bool)
    found = re.fullmatch(r"\s*(\d{1,20}(?:\.\d+)?)\s*([a-zA-Z]*)\s*", _digits(text)) if plain else None
    if found is None or found[2].upper() not in _UNITS or float(found[1]) <= 0:
        raise BadRequestError(f"memory {shown(text)}: expected a positive size such as 8GB, 7.5GiB or 800MB")
    return round(float(found[1]) * _UNITS[found[2].upper()])


def _held(stages: tuple[StageMemory, ...], running: str, resident: tuple[str, ...]) -> int:
    """What resident parts hold while another stage runs. The stages after `language` up to `prefix` count its state."""
    counted = {"language": ("language", "connector", "prefix"), "denoiser": ("denoiser",)}
    return sum(s.held for s in stages if PART_OF[s.stage] in resident and running not in counted.get(s.stage, ()))


def schedule_of(
    stages: tuple[StageMemory, ...], work: Workload, resident: tuple[str, ...], reserve: int, hidden: int = 0
) -> tuple[Move, ...]:
    """The moves of one request when `resident` parts stay and the others come and go.

    hidden: bytes of the decoder that arrive while text is written.
    """
    weights = {PART_OF[s.stage]: s.weights for s in stages}
    base = sum(weights[part] for part in resident) + reserve
    moves, loaded = list[Move](), ""
    for stage in (s for s in stages if s.stage in work.stages):
        part = PART_OF[stage.stage]
        drop = (loaded,) if loaded and loaded != part else ()
        load = (part,) if part not in resident and part != loaded else ()
        loaded = part if part not in resident else "" if drop else loaded
        guest = weights[loaded] if loaded else 0
        peak = base + guest + stage.state + stage.activations + _held(stages, stage.stage, resident)
        peak += hidden if stage.stage in BESIDE else 0
        moves.append(Move(stage=stage.stage, drop=drop, load=load, peak=peak))
    return tuple(moves)


def block_bytes(config: ModelConfig, precision: Precision) -> int:
    """One block of the decoder as the fast path stores it: four products with their scales, two norms."""
    stack, kind = config.decoder.stack, precision.decoder
    width, inner, element = stack.hidden_size, stack.intermediate_size, COMPUTE[precision.compute]
    qkv = width + 2 * stack.num_kv_heads * stack.head_dim
    weights, channels = width * (qkv + width + 3 * inner), qkv + 2 * width + 2 * inner
    if kind == "int4":  # a scale and a minimum for 128 weights
        return weights // 2 + weights // 128 * 2 * element + 2 * width * element
    scales = 0 if kind in COMPUTE else 4 * channels
    return round(weights * BITS[kind] / 8) + scales + 2 * width * element


def blocks_ahead(config: ModelConfig, work: Workload, found: Plan) -> int:
    """Blocks of the decoder that a plan's budget leaves room for while a request of this size writes its text."""
    if found.budget is None or "decoder" in found.resident or not (work.joint and work.paints and work.new_tokens):
        return 0
    schedule = schedule_of(stage_memory(config, work, found.precision), work, found.resident, found.reserve)
    room = found.budget - max(move.peak for move in schedule if move.stage in BESIDE)
    return min(max(room, 0) // block_bytes(config, found.precision), config.decoder.stack.num_layers)


def _ahead(config: ModelConfig, found: Plan) -> Plan:
    """The plan with what it hides."""
    hidden = blocks_ahead(config, found.work, found) * block_bytes(config, found.precision)
    schedule = schedule_of(found.stages, found.work, found.resident, found.reserve, hidden)
    return replace(found, hidden=hidden, schedule=schedule)


def _choices(stages: tuple[StageMemory, ...]) -> Iterator[tuple[str, ...]]:
    """Sets of parts to keep: all, then the heaviest first, for what is kept is not moved. Without all of them the
    vision tower comes for requests with a picture alone: kept, it would take the others' room in every request."""
    weights = {PART_OF[s.stage]: s.weights for s in stages}
    others = [part for part in PARTS if part != "vision"]
    sets = [kept for count in range(len(others) + 1) for kept in combinations(others, count)]
    yield PARTS
    yield from sorted(sets, key=lambda kept: -sum(weights[part] for part in kept))


def _fit(config: ModelConfig, work: Workload, precision: Precision, budget: int | None, reserve: int) -> Plan | None:
    stages = stage_memory(config, work, precision)
    for kept in _choices(stages):
        schedule = schedule_of(stages, work, kept, reserve)
        if budget is None or max(move.peak for move in schedule) <= budget:
            found = Plan(
                precision=precision,
                work=work,
                stages=stages,
                schedule=schedule,
                resident=kept,
                reserve=reserve,
                budget=budget,
            )
            return _ahead(config, found)
    return None


def plan(
    config: ModelConfig,
    work: Workload | None = None,
    *,
    precision: Precision | None = None,
    budget: int | None = None,
    reserve: int = 0,
) -> Plan:
    """What to keep loaded for a request of this size within `budget` bytes (None: all of it stays).

    precision None takes the first of `LADDER` that fits. reserve: bytes that the driver and libraries hold besides.
    Raises OutOfMemoryError, which names the stage that is too large and the nearest choice that fits.
    """
    work = work or Workload()
    for choice in (precision,) if precision else LADDER:
        found = _fit(config, work, choice, budget, reserve)
        if found:
            return found
    assert budget is not None
    tried = precision or LADDER[-1]
    least = schedule_of(stage_memory(config, work, tried), work, (), reserve)
    worst = max(least, key=lambda move: move.peak)
    raise OutOfMemoryError(
        f"stage {worst.stage} alone needs {gigabytes(worst.peak)} of the {gigabytes(budget)} given ({tried}, "
        f"{work.width}x{work.height}); {_advice(config, work, precision, budget, reserve)}"
    )


def _advice(config: ModelConfig, work: Workload, precision: Precision | None, budget: int, reserve: int) -> str:
    """The nearest choice that fits: another precision, then a smaller image, then the least budget."""
    for choice in LADDER if precision else ():
        found = _fit(config, work, choice, budget, reserve)
        if found:
            return f"this fits: {found.summary()}"
    for share in (0.75, 0.5, 0.25):
        height, width = (max(16, int(side * share) // 16 * 16) for side in (work.height, work.width))
        smaller = replace(work, height=height, width=width)
        for choice in (precision, *LADDER) if precision else LADDER:
            found = _fit(config, smaller, choice, budget, reserve)
            if found:
                return f"this fits: {width}x{height}, {found.summary()}"
    peaks = [
        max(move.peak for move in schedule_of(stage_memory(config, work, choice), work, (), reserve))
        for choice in LADDER
    ]
    return f"nothing fits; the least that this image size needs is {gigabytes(min(peaks))} ({LADDER[-1]})"
