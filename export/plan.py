"""What a build would make and what a request would take on a device. All figures are predictions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from mindomni_rt.bundle.contracts import profile
from mindomni_rt.checkpoint.config import ModelConfig, published
from mindomni_rt.checkpoint.layout import open_checkpoint
from mindomni_rt.devices.table import Device, find_device
from mindomni_rt.errors import OutOfMemoryError
from mindomni_rt.memory.footprint import weight_bytes
from mindomni_rt.memory.layers import Workload
from mindomni_rt.memory.planner import Plan, gigabytes, parse_bytes
from mindomni_rt.memory.planner import plan as fit
from mindomni_rt.memory.precision import Precision
from mindomni_rt.stages import PART_OF, STAGES

from .targets import ARCHITECTURES, QUANTIZED, Choice, Target, choose


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
    size: tuple[int, int] | None = None,
    budget: str | float | None = None,
) -> BuildPlan:
    """Plans a bundle for a device of the table, of the published model or a checkpoint's configuration.

    size: (width, height) in pixels; None is the model's own, whose steps and guidance are taken too. budget: such as
    "8GiB"; None is the device's memory. Raises UnsupportedDeviceError, BadRequestError, and OutOfMemoryError that names
    the nearest choice which fits.
    """
    device = find_device(device_name)
    architecture = ARCHITECTURES[device.sm]
    choice = choose(Target(runtime=architecture.runtime, sms=(device.sm,)), precision, stages)
    config = open_checkpoint(checkpoint).config if checkpoint else published()
    own = config.recommended
    width, height = size or (own.width, own.height)
    work = Workload(height=height, width=width, steps=own.num_inference_steps, guidance=own.guidance_scale != 1)
    stored = Precision.of_stages(choice.stages, choice.dtype)
    limit = device.bytes if budget is None else parse_bytes(budget)
    reserve = device.reserve + _cache_beyond(config, work)
    try:
        memory = fit(config, work, precision=stored, budget=limit, reserve=reserve)
    except OutOfMemoryError as error:
        raise OutOfMemoryError(
            f"{str(error).split(';')[0]}; {_nearest(config, device, work, limit, reserve)}"
        ) from error
    weights = weight_bytes(config, stored)
    disk = {stage: weights[PART_OF[stage]] for stage in STAGES}
    return BuildPlan(device=device, choice=choice, memory=memory, disk=disk, reason=architecture.reason)


def _nearest(config: ModelConfig, device: Device, work: Workload, limit: int, reserve: int) -> str:
    """The first smaller choice that fits, as arguments of `build` and `plan`: coarser weights, then smaller images."""
    architecture = ARCHITECTURES[device.sm]
    target = Target(runtime=architecture.runtime, sms=(device.sm,))
    plain = "bf16" if "bf16" in architecture.precisions else "fp16"
    choices = [{}, {"language": "int4", "prefix": "int8", "denoiser": "int8"}, dict.fromkeys(QUANTIZED, "int4")]
    choices = [c for c in choices if all(p in architecture.precisions for p in c.values())]
    halves = [{**c, "vae": plain} for c in choices if plain == "bf16"]
    smaller = [(side, side) for side in (768, 512, 256) if side**2 < work.width * work.height]
    for width, height in ((work.width, work.height), *smaller):
        for stages in (*choices, *halves):
            stored = Precision.of_stages(*_stages(choose(target, None, stages)))
            try:
                asked = replace(work, height=height, width=width)
                found = fit(config, asked, precision=stored, budget=limit, reserve=reserve)
            except OutOfMemoryError:
                continue
            given = " ".join(f"--stage {stage}={name}" for stage, name in stages.items()) or "the defaults"
            return f"this fits: --size {width}x{height} with {given} (peak {gigabytes(found.peak)})"
    return f"nothing that can be built for this device fits, down to {width}x{height}"


def _stages(choice: Choice) -> tuple[Mapping[str, str], str]:
    return choice.stages, choice.dtype


def _cache_beyond(config: ModelConfig, work: Workload) -> int:
    """Bytes of an engine's KV cache, whose capacity is fixed, beyond the tokens of the request."""
    size = max(work.width, work.height)
    sides = profile("512" if size <= 512 else "1024" if size <= 1024 else "any", config)
    stack = config.language.stack
    rows = max(sides.ranges["capacity"][2] - work.condition_tokens, 0)
    return rows * 2 * stack.num_layers * stack.num_kv_heads * stack.head_dim * 2


def report(plan: BuildPlan) -> str:
    """The plan as text."""
    memory = plan.memory
    lines = [
        f"{plan.device.name} ({plan.device.sm}), {gigabytes(plan.device.bytes)}"
        + (" shared with the CPU" if plan.device.unified else ""),
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
    budget = memory.budget or plan.device.bytes
    lines += [
        "",
        f"stays loaded: {', '.join(memory.resident) or 'nothing'}",
        f"peak {gigabytes(memory.peak)} of {gigabytes(budget)} ({gigabytes(memory.reserve)} of it for the system, "
        "CUDA and the fixed cache)",
        f"bundle {gigabytes(sum(plan.disk.values()))} on disk (prefix and denoiser each hold the decoder's weights); "
        f"{gigabytes(plan.build_disk)} free are needed to build",
    ]
    return "\n".join(lines)
