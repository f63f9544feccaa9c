"""What a checkpoint runs in on the machine at hand, decided before a weight is read.

The rule for a CPU. Weights that are used in their stored type stay mapped to the file: they are page cache, which the
kernel takes back, not memory of the process. A stage reads the weights of its part again and again, so there must be
room for that part beside the process's own memory, but not for all parts at once. Weights that are converted are the
process's own, all of them, for as long as it lives. Of the language model's input table a row is read for a token, so
it needs no room while it is mapped. The VAE computes in float32.

The rule for a GPU is the planner's: the largest set of parts that leaves room for the work stays, the others wait in
pinned memory of the host and take turns.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

from ..checkpoint.config import ModelConfig
from ..checkpoint.layout import PARTS, Checkpoint
from ..checks import shown
from ..devices.table import RESERVE
from ..errors import BadRequestError, OutOfMemoryError
from .bundle_need import predicted_need
from .footprint import Precision, stage_memory, weight_bytes
from .layers import BUDGETED, PART_OF, Workload, parameters
from .machine import Machine
from .planner import LADDER, Plan, gigabytes, parse_bytes, plan, schedule_of
from .precision import parse_precision, plain_vae, split_attention

logger = logging.getLogger(__name__)
HOST_RESERVE = 500 * 10**6  # the interpreter, torch and its buffers
WIDE = 100 * 10**6  # a slice of a weight in float32, and the norms and biases
SIDES = (3072, 2048, 1536, 1024, 768, 512, 256)
"""Sides of square images to name in advice, in pixels."""
TOKENS = (8192, 4096, 2048, 1369, 1024, 512, 256)
"""Tokens of an input image to name in advice."""
BUDGETS = "auto, a size such as 8GiB, or None for no limit"
_TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How to load. dtype, precision, budget: arguments of the torch backend; stays: stages of a bundle, or parts of a
    model on a GPU, that stay loaded (None: all); side: of the largest image that fits, in pixels. peak: bytes at most,
    a prediction, of which `mapped` are page cache; free: bytes found; why: the choice in words; lossy: it is not what
    the defaults ask for; needs: bytes at most of a request as loaded here, a prediction (None: unknown); moved_bytes:
    of weights that a request uploads on a GPU, of which hidden_bytes while its text is written; left: bytes by which
    buffers of earlier requests, sizes of which are given by stage, exceed a request's own (None: nothing is left)."""

    device: str
    dtype: str | None
    precision: str | None = None
    budget: str | float | None = None
    stays: tuple[str, ...] | None = None
    side: int = 1024
    peak: int = 0
    mapped: int = 0
    free: int | None = None
    why: str = ""
    lossy: bool = False
    moved_bytes: int = 0
    hidden_bytes: int = 0
    needs: Callable[[Workload], int] | None = field(default=None, repr=False, compare=False)
    left: Callable[[Workload, Mapping[str, Workload]], int] | None = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("needs", "left")}

    def fits(self, work: Workload, kept: Mapping[str, Workload] | None = None) -> bool:
        """Whether a request fits, beside buffers of other sizes that are kept; True where nothing is known."""
        if self.needs is None or self.free is None:
            return True
        beside = self.left(work, kept) if self.left and kept else 0
        return self.needs(work) + beside <= self.free

    def check(self, work: Workload) -> None:
        """Raises OutOfMemoryError for a request that would not fit, before any of its work."""
        if self.fits(work):
            return
        assert self.needs is not None and self.free is not None
        what = f"{work.images} image{'s' * (work.images > 1)} of {work.width}x{work.height}"
        raise OutOfMemoryError(
            f"{what if work.paints else 'a question'}: {gigabytes(self.needs(work))} of memory needed after "
            f"{work.condition_tokens} tokens of text, {gigabytes(self.free)} may be used (memory_budget, or what was "
            f"free at loading); {self._smaller(work)}"
        )

    def _smaller(self, work: Workload) -> str:
        """Advice: the largest image that fits, then the largest input image."""
        for side in SIDES if work.paints else ():
            if self.fits(replace(work, height=side, width=side, images=1)):
                return f"one image of {side}x{side} fits"
        for tokens in TOKENS if work.patches[0] else ():
            # As many merged tokens in a square, and the prompt shorter by the others.
            side, spared = 2 * math.isqrt(tokens), work.patches[0] * work.patches[1] // 4 - tokens
            if self.fits(replace(work, patches=(side, side), prompt_tokens=max(work.prompt_tokens - spared, 1))):
                return f"with max_image_tokens={tokens} it fits"
        return "close other programs or shorten the prompt, and load again"

    def summary(self) -> str:
        """One line."""
        mapped = f" ({gigabytes(self.mapped)} of it mapped weights)" if self.mapped else ""
        free = f" of {gigabytes(self.free)} free" if self.free is not None else ", free memory unknown"
        return f"{self.device}, {self.dtype}: {self.why}; predicted peak {gigabytes(self.peak)}{mapped}{free}"

    def log(self) -> None:
        """One line; a warning where the choice costs quality or much speed."""
        logger.log(logging.WARNING if self.lossy else logging.INFO, "%s", self.summary())


@dataclass(frozen=True)
class Need:
    """Bytes of one stage on a CPU: of the process, and of mapped weights that it reads again and again."""

    stage: str
    own: int
    mapped: int

    @property
    def total(self) -> int:
        return self.own + self.mapped


def stored_types(checkpoint: Checkpoint) -> dict[str, str]:
    """The type that most elements of each part are stored in."""
    found = {}
    for part in PARTS:
        counts: dict[str, int] = {}
        for entry in checkpoint.tensors[part].values():
            size = 1
            for side in entry.shape:
                size *= side
            counts[entry.dtype] = counts.get(entry.dtype, 0) + size
        kind = max(counts, key=lambda name: counts[name], default="F32")
        found[part] = _TYPES.get(kind, kind)
    return found


def cpu_needs(
    config: ModelConfig, stored: Mapping[str, str], dtype: str, work: Workload, wide: bool = False
) -> list[Need]:
    """What each stage of a request needs on a CPU with weights in dtype, by the rule above.

    wide: such weights are computed in float32.
    """
    weights = weight_bytes(config, Precision.uniform(dtype, vae="float32"))
    computed = Precision.uniform("float32" if wide else dtype, vae="float32")
    mapped = {part: stored[part] == ("float32" if part == "vae" else dtype) for part in weights}
    own = HOST_RESERVE + WIDE * wide + sum(size for part, size in weights.items() if not mapped[part])
    found = []
    for stage in stage_memory(config, work, computed, parked=True):
        if stage.stage not in work.stages:
            continue
        part = PART_OF[stage.stage]
        reads = weights[part] if mapped[part] else 0
        if reads and part == "language" and not config.language.tie_embeddings:
            reads -= parameters(config)[part].embedding * (4 if dtype == "float32" else 2)
        found.append(Need(stage.stage, own + stage.state + stage.activations, reads))
    return found


def budget_bytes(memory_budget: str | float | None, free: int | None) -> int | None:
    """Bytes that may be used: what is free for "auto", the smaller of the two for a size, None for no limit."""
    if memory_budget is None:
        return None
    if isinstance(memory_budget, str) and memory_budget.strip().lower() == "auto":
        return free
    try:
        asked = parse_bytes(memory_budget)
    except BadRequestError as error:
        raise BadRequestError(f"memory_budget {shown(memory_budget)}: expected {BUDGETS}") from error
    return asked if free is None else min(asked, free)


def room_of(limit: int, free: int | None) -> tuple[str, str]:
    """What a model did not fit into, and the advice that follows: the given budget, or what is free."""
    if free is None or limit < free:
        size = gigabytes(limit) if limit >= 10**7 else f"{limit} bytes"
        return f"memory_budget is {size}", "raise memory_budget"
    return f"{gigabytes(limit)} are free", "close other programs or use a larger machine"


def fit_checkpoint(
    checkpoint: Checkpoint,
    machine: Machine,
    *,
    device: str = "auto",
    dtype: str | None = None,
    precision: str | None = None,
    memory_budget: str | float | None = "auto",
) -> Fit:
    """The most exact way to run a checkpoint that fits this machine.

    device "auto" is the first GPU where there is one, else the CPU. dtype and precision given are kept to. Raises
    OutOfMemoryError before anything is read, naming what would fit; BadRequestError, UnsupportedDeviceError.
    """
    if dtype not in (None, "float32", "float16", "bfloat16"):
        raise BadRequestError(f"dtype {dtype!r}: expected one of float32, float16, bfloat16")
    if device == "auto":
        device = "cuda" if machine.gpus else "cpu"
    limit = budget_bytes(memory_budget, machine.free(device))
    if device == "cpu":
        return _fit_cpu(checkpoint, machine, dtype, limit)
    found = _fit_gpu(checkpoint, machine, device, dtype, precision, limit)
    # A size that was asked for limits what runs beside the model too, though all of it fits; what is free does not.
    asked = memory_budget is not None and str(memory_budget).strip().lower() != "auto"
    return replace(found, budget=limit) if asked else found


def cpu_types(stored: str) -> tuple[str, ...]:
    """Types of weights to try on a CPU, the first choice first. Weights in 16 bits are computed as they are or widened
    to float32 by each product, so a float32 copy of them gains nothing."""
    return (stored,) if stored in ("bfloat16", "float16") else ("float32", "bfloat16")


def gpu_reserve(machine: Machine, device: str) -> int:
    """Bytes of a GPU's memory that are not for the model: a CUDA context and the libraries' workspaces."""
    return RESERVE[bool(machine.gpus) and machine.gpu(device).free is None]


def _fit_cpu(checkpoint: Checkpoint, machine: Machine, dtype: str | None, limit: int | None) -> Fit:
    config, stored = checkpoint.config, stored_types(checkpoint)
    first = dtype or cpu_types(stored["language"])[0]
    for kind, side in _cpu_choices(dtype, stored["language"]):
        wide = machine.widens(kind)
        needs = cpu_needs(config, stored, kind, Workload(height=side, width=side), wide)
        worst = max(needs, key=lambda need: need.total)
        if limit is not None and worst.total > limit:
            continue

        def needed(work: Workload, kind: str = kind, wide: bool = wide) -> int:
            return max(need.total for need in cpu_needs(config, stored, kind, work, wide))

        why = (
            "the stored type, mapped from the file" if kind == stored["language"] else f"stored as {stored['language']}"
        )
        if wide:
            why += ", computed in float32"
        rounded = dtype is None and kind != first
        if rounded:
            why += f", {first} does not fit"
        if side < 1024:
            why += f", images up to {side}x{side}"
        return Fit(
            device="cpu",
            dtype=kind,
            side=side,
            peak=worst.total,
            mapped=worst.mapped,
            free=limit,
            why=why,
            lossy=rounded or side < 1024,
            needs=needed,
        )
    assert limit is not None
    needs = cpu_needs(config, stored, first, Workload(height=256, width=256), machine.widens(first))
    worst = max(needs, key=lambda need: need.total)
    raise OutOfMemoryError(
        f"{checkpoint.path} does not fit in {first}: stage {worst.stage} needs {gigabytes(worst.total)} of memory, "
        f"{room_of(limit, machine.free('cpu'))[0]}; nothing was loaded. "
        f"{_instead(checkpoint, stored, machine, dtype, limit)}"
    )


def _cpu_choices(dtype: str | None, stored: str) -> Iterator[tuple[str, int]]:
    """(type, image side) to try: types first, then smaller images."""
    for side in (1024, 512, 256):
        for kind in (dtype,) if dtype else cpu_types(stored):
            yield kind, side


def _instead(checkpoint: Checkpoint, stored: Mapping[str, str], machine: Machine, dtype: str | None, limit: int) -> str:
    """What would fit: the stored type, then a bundle with 8-bit and with 4-bit weights."""
    kind = stored["language"]
    if dtype is not None and kind != dtype:
        needs = cpu_needs(checkpoint.config, stored, kind, Workload(), machine.widens(kind))
        worst = max(needs, key=lambda need: need.total)
        if worst.total <= limit:
            return f"This fits: dtype={kind!r} (the stored type, peak {gigabytes(worst.total)})"
    least = 0
    for name in ("int8", "int4"):
        for side in (1024, 512, 256):
            least = predicted_need(checkpoint.config, name, Workload(height=side, width=side))
            if least <= limit:
                return (
                    f"This fits: a bundle in {name} (peak {gigabytes(least)}, images up to {side}x{side}), made by: "
                    f"mindomni export build {checkpoint.path} --target cpu --precision {name} --out BUNDLE"
                )
    return f"Nothing fits: a bundle in int4 needs {gigabytes(least)}; close other programs or use a larger machine"


def _fit_gpu(
    checkpoint: Checkpoint, machine: Machine, device: str, dtype: str | None, precision: str | None, limit: int | None
) -> Fit:
    config, gpu, reserve = checkpoint.config, machine.gpu(device), gpu_reserve(machine, device)
    dtype = dtype or ("bfloat16" if gpu.capability >= (8, 0) else "float16")
    asked, attention = split_attention(precision)
    work = BUDGETED
    ladder = [parse_precision(asked, dtype, plain_vae(dtype, "cuda"))] if asked else list(_ladder(dtype))
    for place, choice in enumerate(ladder):
        try:
            found = plan(config, work, precision=choice, budget=limit, reserve=reserve)
        except OutOfMemoryError:
            continue
        waiting = sum(size for part, size in weight_bytes(config, choice).items() if part not in found.resident)
        if waiting and gpu.free is None:
            continue  # what waits on the host would be there twice while it works
        if gpu.free is not None and machine.host and waiting + HOST_RESERVE > machine.host.free:
            continue
        default = place == 0 and not asked and not found.moved
        pairs = [] if default else [precision_text(choice)] if asked is None else [asked]
        pairs += [f"attention={attention}"] if attention != "auto" else []
        moved = f", {gigabytes(found.moved)} move in each request, {found.behind()}" if found.moved else ""
        return Fit(
            device=device,
            dtype=dtype,
            precision=",".join(pairs) or None,
            budget=limit if found.moved else None,
            stays=found.resident,
            peak=found.peak,
            free=limit,
            why=f"{choice}{moved}",
            lossy=not asked and bool(place or found.moved),
            moved_bytes=found.moved,
            hidden_bytes=found.hidden,
            needs=partial(_gpu_needs, config, found),
            left=partial(_gpu_left, config, found.precision),
        )
    assert limit is not None
    try:
        plan(config, work, precision=ladder[-1], budget=limit, reserve=reserve)
        reason = f"the parts that wait need more than the {gigabytes(machine.free('cpu') or 0)} free on the host"
        if gpu.free is None:
            reason = f"not all of it fits into {gigabytes(limit)}, and where host and GPU share memory no part can wait"
    except OutOfMemoryError as error:
        reason = str(error)
    raise OutOfMemoryError(
        f"{checkpoint.path} does not fit {device} ({gpu.name}): {reason}. {_on_cpu(checkpoint, machine)}"
    )


def _gpu_needs(config: ModelConfig, found: Plan, work: Workload) -> int:
    """Bytes at most of a request on the fast path with the parts of a plan loaded, the reserve included.

    What a plan hides is left out: fewer blocks are uploaded ahead where a request needs their room.
    """
    work = replace(work, joint=True)
    stages = stage_memory(config, work, found.precision)
    return max(move.peak for move in schedule_of(stages, work, found.resident, found.reserve))


def _gpu_left(config: ModelConfig, precision: Precision, work: Workload, kept: Mapping[str, Workload]) -> int:
    """Bytes of the fast path's buffers for the sizes in `kept`, by stage, beyond those that a request has itself."""

    def held(sizes: Workload) -> dict[str, int]:
        return {s.stage: s.held for s in stage_memory(config, replace(sizes, joint=True), precision)}

    own = held(work)
    return sum(max(held(sizes)[stage] - own[stage], 0) for stage, sizes in kept.items())


def _on_cpu(checkpoint: Checkpoint, machine: Machine) -> str:
    try:
        found = _fit_cpu(checkpoint, machine, None, machine.free("cpu"))
    except OutOfMemoryError:
        return "Nothing was loaded"
    return f"Nothing was loaded. On the CPU this fits: {found.summary()}"


def _ladder(dtype: str) -> Iterator[Precision]:
    """Precisions to try on a GPU, the fast path's default first. float32 asked for is kept to.

    SDXL's VAE overflows in float16: it is float32 there.
    """
    if dtype == "float32":
        yield Precision.uniform(dtype)
        return
    vae = "bfloat16" if dtype == "bfloat16" else "float32"
    seen = []
    for step in LADDER:
        kinds = {
            part: dtype if getattr(step, part) == step.compute else getattr(step, part)
            for part in ("language", "head", "decoder")
        }
        choice = Precision(compute=dtype, vae=vae, **kinds)
        if choice not in seen:
            seen.append(choice)
            yield choice


def precision_text(precision: Precision) -> str:
    """The argument of `load` that means this precision."""
    return ",".join(f"{part}={getattr(precision, part)}" for part in ("language", "head", "decoder", "vae"))
