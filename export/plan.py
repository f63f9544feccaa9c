"""What a build would make and what running it would take, told before any work. All figures are predictions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mindomni_rt.checkpoint import open_checkpoint
from mindomni_rt.config import ModelConfig, published
from mindomni_rt.contracts import profile
from mindomni_rt.memory import Precision, weight_bytes
from mindomni_rt.planner import Plan, gigabytes, parse_bytes
from mindomni_rt.planner import plan as fit
from mindomni_rt.shapes import PART_OF, STAGES, Workload

from .targets import ARCHITECTURES, DEVICES, Choice, Device, Target, choose

# Not ours to use: CUDA's context and the desktop on a card of its own, the system on memory that the CPU shares.
_RESERVE = {False: 700 * 10**6, True: 2000 * 10**6}
_STORED = {"int8wo": "int8"}


@dataclass(frozen=True, kw_only=True)
class BuildPlan:
    """What `build` would make for a device, and how a request would run there. disk: bytes of each stage's files."""

    device: Device
    choice: Choice
    memory: Plan
    disk: dict[str, int]
    reason: str

    @property
    def build_disk(self) -> int:
        """Bytes needed while building: the traced weights stand beside the engines."""
        return sum(self.disk.values()) + sum(n for stage, n in self.disk.items() if stage != "prefix")


def plan_build(
    device_name: str,
    *,
    checkpoint: Path | None = None,
    precision: str | None = None,
    stages: dict[str, str] | None = None,
    size: int = 1024,
    budget: str | float | None = None,
) -> BuildPlan:
    """Plans a bundle for a device of the table, of the published model or a checkpoint's configuration.

    size: image side in pixels. budget: such as "8GiB"; None is the device's memory. Raises UnsupportedDeviceError,
    BadRequestError, and OutOfMemoryError that names the nearest choice which fits.
    """
    device = DEVICES[device_name]
    architecture = ARCHITECTURES[device.sm]
    choice = choose(Target(runtime=architecture.runtime, sms=(device.sm,)), precision, stages)
    config = open_checkpoint(checkpoint).config if checkpoint else published()
    work = Workload(height=size, width=size)
    stored = stored_as(choice)
    limit = device.memory if budget is None else parse_bytes(budget)
    reserve = _RESERVE[device.shared] + _cache_beyond(config, work, size)
    memory = fit(config, work, precision=stored, budget=limit, reserve=reserve)
    weights = weight_bytes(config, stored)
    disk = {stage: weights[PART_OF[stage]] for stage in STAGES}
    return BuildPlan(device=device, choice=choice, memory=memory, disk=disk, reason=architecture.reason)


def stored_as(choice: Choice) -> Precision:
    """A build's precisions in the planner's terms."""

    def of(stage: str) -> str:
        name = choice.stages[stage]
        return {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}.get(name, _STORED.get(name, name))

    vae = {"mixed": "float32"}.get(choice.stages["vae"], of("vae"))
    return Precision(
        compute=choice.dtype, language=of("language"), decoder=of("denoiser"), head=choice.dtype, vae=vae
    )


def _cache_beyond(config: ModelConfig, work: Workload, size: int) -> int:
    """Bytes of an engine's KV cache, whose capacity is fixed, beyond the tokens of the request."""
    sides = profile("512" if size <= 512 else "1024" if size <= 1024 else "any", config)
    stack = config.language.stack
    rows = max(sides.ranges["capacity"][2] - work.condition_tokens, 0)
    return rows * 2 * stack.num_layers * stack.num_kv_heads * stack.head_dim * 2


def report(plan: BuildPlan) -> str:
    """The plan as text."""
    memory = plan.memory
    lines = [
        f"{plan.device.name} ({plan.device.sm}), {gigabytes(plan.device.memory)}"
        + (" shared with the CPU" if plan.device.shared else ""),
        f"{memory.work.width}x{memory.work.height}, {memory.work.steps} steps, {memory.work.condition_tokens} tokens; "
        "all figures are predictions",
        "",
        f"{'stage':10} {'precision':9} {'weights':>10} {'state':>10} {'activations':>12} {'on disk':>10}",
    ]
    for stage in memory.stages:
        lines.append(
            f"{stage.stage:10} {plan.choice.stages[stage.stage]:9} {gigabytes(stage.weights):>10} "
            f"{gigabytes(stage.state):>10} {gigabytes(stage.activations):>12} {gigabytes(plan.disk[stage.stage]):>10}"
        )
    lines += ["", f"why: {plan.reason}", "", f"{'before':10} {'drop':12} {'load':12} {'peak':>10}"]
    for move in memory.schedule:
        lines.append(
            f"{move.stage:10} {', '.join(move.drop) or '-':12} {', '.join(move.load) or '-':12} "
            f"{gigabytes(move.peak):>10}"
        )
    budget = memory.budget or plan.device.memory
    lines += [
        "",
        f"stays loaded: {', '.join(memory.resident) or 'nothing'}",
        f"peak {gigabytes(memory.peak)} of {gigabytes(budget)} (with {gigabytes(memory.reserve)} for the system, CUDA and "
        "the fixed cache)",
        f"bundle {gigabytes(sum(plan.disk.values()))} on disk (prefix and denoiser each hold the decoder's weights); "
        f"{gigabytes(plan.build_disk)} free are needed to build",
    ]
    return "\n".join(lines)
