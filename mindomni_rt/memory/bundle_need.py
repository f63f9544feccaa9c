"""What a bundle needs in memory, from sizes alone: a prediction for one that is not built yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..checkpoint.config import ModelConfig
from ..stages import PART_OF, STAGES
from .footprint import StageMemory, stage_memory, weight_bytes
from .layers import Workload
from .precision import Precision

BUNDLE_RESERVE = 250 * 10**6  # the interpreter, numpy and the runtime


def peak(stages: Sequence[StageMemory], weights: Mapping[str, int], stays: Sequence[str]) -> int:
    """Bytes at most over a request when `stays` stay loaded and each other stage is loaded to run."""
    kept = sum(weights[stage] for stage in stays)
    return max(kept + (0 if s.stage in stays else weights[s.stage]) + s.state + s.activations for s in stages)


def predicted_need(config: ModelConfig, precision: str, work: Workload) -> int:
    """Bytes that a CPU bundle of a precision ("int8", "int4") will need at least, its stages taking turns."""
    names = dict.fromkeys(STAGES, "fp32") | dict.fromkeys(("language", "prefix", "denoiser"), precision)
    kinds = Precision.of_stages(names, "float32")
    sizes = weight_bytes(config, kinds)
    weights = {stage: sizes[PART_OF[stage]] for stage in STAGES}
    stages = [s for s in stage_memory(config, work, kinds) if s.stage in work.stages]
    return peak(stages, weights, ()) + BUNDLE_RESERVE
