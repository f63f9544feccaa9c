"""Which stages of a bundle stay loaded on the machine at hand, from the sizes of its files.

A runtime reads a graph's weights into memory of its own (onnxruntime rearranges them for its products), so a stage
needs the bytes of all its files while it is loaded, beside its caches and intermediate tensors. Stages that do not fit
at once take turns: each is loaded when it runs and leaves when the next one does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path

from ..bundle.contracts import STAGES
from ..bundle.manifest import Manifest
from ..errors import OutOfMemoryError
from .bundle_need import BUNDLE_RESERVE, peak, predicted_need
from .fit import Fit, budget_bytes, gpu_reserve, room_of
from .footprint import Precision, StageMemory, stage_memory
from .layers import Workload
from .machine import Machine
from .planner import gigabytes


def graph_bytes(manifest: Manifest) -> dict[str, int]:
    """Bytes of each stage's files. A file that two stages name is loaded for each of them."""
    files: dict[str, set[str]] = {stage: set() for stage in STAGES}
    for graph in manifest.graphs.values():
        files[graph.stage] |= {graph.file, *graph.data}
    return {stage: sum(manifest.files[name].bytes for name in names) for stage, names in files.items()}


def fit_bundle(
    manifest: Manifest,
    machine: Machine,
    *,
    folder: Path,
    device: str = "auto",
    memory_budget: str | float | None = "auto",
) -> Fit:
    """The stages to keep loaded: those whose weights cost most to load again, as many as fit beside the work.

    device "auto" is the first GPU for engines, and the CPU for ONNX graphs. Raises OutOfMemoryError before anything
    is read, naming what would fit.
    """
    if device == "auto":
        device = "cpu" if manifest.runtime == "onnx" else "cuda"
    # Where no GPU is seen, the runtime says what it lacks.
    free = machine.free(device) if device == "cpu" or machine.gpus else None
    limit = budget_bytes(memory_budget, free)
    reserve = BUNDLE_RESERVE if device == "cpu" else gpu_reserve(machine, device) + _fixed_cache(manifest)
    weights, sides = graph_bytes(manifest), _sides(manifest)
    found: tuple[int, tuple[str, ...]] = (0, ())
    for side in sides:
        stages = _stages(manifest, weights, Workload(height=side, width=side))
        for stays in _choices(weights):
            found = (peak(stages, weights, stays) + reserve, stays)
            if limit is None or found[0] <= limit:
                fit = _fit(manifest, device, limit, found, weights, side, side < sides[0])
                return replace(fit, needs=partial(_needed, manifest, weights, stays, reserve))
    assert limit is not None
    least = Workload(height=sides[-1], width=sides[-1])
    worst = max(_stages(manifest, weights, least), key=lambda s: weights[s.stage] + s.state + s.activations)
    room, advice = room_of(limit, free)
    raise OutOfMemoryError(
        f"{folder} does not fit {device}: stage {worst.stage} alone needs {gigabytes(found[0])}, {room}; "
        f"nothing was loaded. {_instead(manifest, limit, reserve, sides) or f'Nothing smaller can be built; {advice}'}"
    )


def _fit(
    manifest: Manifest,
    device: str,
    limit: int | None,
    found: tuple[int, tuple[str, ...]],
    weights: Mapping[str, int],
    side: int,
    smaller: bool,
) -> Fit:
    total, stays = found
    away = [stage for stage in STAGES if stage not in stays and weights[stage]]
    why = f"{', '.join(away)} take turns" if away else "everything stays loaded"
    return Fit(
        device=device,
        dtype=manifest.dtype,
        stays=stays,
        side=side,
        peak=total,
        free=limit,
        why=f"{why}, images up to {side}x{side}" if smaller else why,
        lossy=bool(away) or smaller,
    )


def _sides(manifest: Manifest) -> tuple[int, ...]:
    """Image sides to try, the largest that the bundle takes first."""
    largest = 512 if manifest.profile.name == "512" else 1024
    return tuple(side for side in (1024, 512, 256) if side <= largest)


def _precision(manifest: Manifest) -> Precision:
    stages = {graph.stage: graph.precision for name, graph in manifest.graphs.items() if name == graph.stage}
    return Precision.of_stages(stages, manifest.dtype)


def _needed(manifest: Manifest, weights: Mapping[str, int], stays: Sequence[str], reserve: int, work: Workload) -> int:
    return peak(_stages(manifest, weights, work), weights, stays) + reserve


def _stages(manifest: Manifest, weights: Mapping[str, int], work: Workload) -> list[StageMemory]:
    """Caches and intermediate tensors of the stages that this bundle holds."""
    stages = stage_memory(manifest.model, work, _precision(manifest))
    return [s for s in stages if weights[s.stage] and s.stage in work.stages]


def _fixed_cache(manifest: Manifest) -> int:
    """Bytes of an engine's key-value cache, whose capacity its profile fixes, beyond the tokens of the request."""
    stack = manifest.model.language.stack
    capacity = manifest.profile.ranges.get("capacity", (0, 0, 0))[2]
    rows = max(capacity - Workload().condition_tokens, 0)
    return rows * 2 * stack.num_layers * stack.num_kv_heads * stack.head_dim * 2


def _choices(weights: Mapping[str, int]) -> Iterator[tuple[str, ...]]:
    """Sets of stages to keep, the heaviest first: what is kept is not loaded again.

    Vision counts last: only a request with an image needs it.
    """
    held = [stage for stage in STAGES if weights[stage]]
    sets = [kept for count in range(len(held) + 1) for kept in combinations(held, count)]

    def loaded_again(kept: tuple[str, ...]) -> tuple[int, bool]:
        return -sum(weights[stage] for stage in kept if stage != "vision"), "vision" not in kept

    yield from sorted(sets, key=loaded_again)


def _instead(manifest: Manifest, limit: int, reserve: int, sides: Sequence[int]) -> str:
    kinds = {graph.precision for graph in manifest.graphs.values() if graph.stage == "language"}
    for side in sides:
        least = predicted_need(manifest.model, "int4", Workload(height=side, width=side)) - BUNDLE_RESERVE + reserve
        if "int4" not in kinds and least <= limit:
            return (
                f"This fits: the same built with --precision int4 (peak {gigabytes(least)}, images up to {side}x{side})"
            )
    return ""
