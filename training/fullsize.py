"""The published sizes without the weights: what trains, memory of each GPU, and one measured step on a GPU.

`report` builds the model on torch's meta device, so it runs anywhere in seconds. `gpu_step` fills the same model with
random weights on a GPU and runs one step of stage 1 and one of RGPO. The plan is a prediction; the step is measured.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mindomni_rt.checkpoint.config import ModelConfig, published
from mindomni_rt.errors import UnsupportedDeviceError
from mindomni_rt.inputs.prompts import Chat
from mindomni_rt.judgement import described, judged
from mindomni_rt.model.block import Block
from mindomni_rt.model.mindomni import MindOmniModel
from mindomni_rt.model.random.weights import random_model

from .config import Config
from .data.record import Record
from .fresh import write_tokenizer
from .stages.base import Draws, Stage
from .stages.contexts import Contexts

GIB = 2**30
GRADIENT = 0.4
"""Bound of a gradient's distance from float32's, all of the model in 16 bits; that of another gradient is above 1."""
OMNIGEN_VOCABULARY = 32064
# Bytes kept for the backward pass, per token and layer: about 17 values of width `hidden` and 3 of the MLP's, at 2
# bytes; attention keeps no matrix (fused kernels). An estimate: `--gpu-step` measures.
_KEPT_HIDDEN, _KEPT_MLP = 17, 3


def full_config() -> ModelConfig:
    """The published sizes, with OmniGen's own text embedding, which distillation needs."""
    base = published()
    return dataclasses.replace(
        base, decoder=dataclasses.replace(base.decoder, text_vocab_size=OMNIGEN_VOCABULARY), edit_features="vit"
    )


def meta_stage(config: Config, model_config: ModelConfig | None = None) -> Stage:
    """The configuration's stage over a model without storage."""
    from .stages.pretrain import Pretrain
    from .stages.prior import Prior
    from .stages.rgpo import Rgpo
    from .stages.sft import Sft

    kinds: dict[str, type[Stage]] = {"prior": Prior, "pretrain": Pretrain, "sft": Sft, "rgpo": Rgpo}
    with torch.device("meta"):
        model = MindOmniModel(model_config or full_config()).to(torch.bfloat16)
        stage = kinds[config.stage](model, _Sizes(model), config)  # type: ignore[arg-type]
    stage.choose_trainable()
    return stage


class _Sizes:
    """What a stage's constructor reads of its contexts, for a model that computes nothing."""

    def __init__(self, model: MindOmniModel) -> None:
        self.model, self.config, self.device = model, model.config, torch.device("meta")


@dataclass(frozen=True)
class Plan:
    """GiB of one GPU. All are predictions."""

    gpus: int
    frozen: float
    trained: float
    gradients: float
    optimizer: float
    average: float
    gathered: float
    activations: float

    @property
    def total(self) -> float:
        return sum(
            (self.frozen, self.trained, self.gradients, self.optimizer, self.average, self.gathered, self.activations)
        )


def memory_plan(stage: Stage, gpus: int, text_tokens: int = 512) -> Plan:
    """Memory of one of `gpus` GPUs under the loop's sharding: weights, gradients, moments, gathers, activations.

    text_tokens: the length of a context, thought included.
    """
    config = stage.config
    parameters = list(stage.model.parameters())
    frozen = sum(p.numel() * p.element_size() for p in parameters if not p.requires_grad)
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    gathered = 0.0
    if gpus > 1:
        blocks = [m for m in stage.model.modules() if isinstance(m, Block)]
        inside = {id(p) for b in blocks for p in b.parameters()}
        largest = max(sum(p.numel() for p in b.parameters()) for b in blocks)
        outside = sum(p.numel() for p in parameters if id(p) not in inside)
        gathered = 2.0 * (2 * largest + outside)  # two blocks at a time, and the root, in bf16
    rows = config.optim.batch / gpus * (config.rgpo.group if config.stage == "rgpo" else 1)
    return Plan(
        gpus,
        frozen / gpus / GIB,
        4 * trained / gpus / GIB,
        4 * trained / gpus / GIB,
        8 * trained / gpus / GIB,
        (4 * trained / gpus / GIB) if config.optim.ema else 0.0,
        gathered / GIB,
        math.ceil(rows) * _activations(stage, text_tokens) / GIB,
    )


def _activations(stage: Stage, text_tokens: int) -> float:
    """Bytes kept for the backward pass of one sequence."""
    model, image_tokens = stage.model.config, (stage.config.data.image_size // 16) ** 2

    def stack(config: Any, tokens: int) -> float:
        width = _KEPT_HIDDEN * config.hidden_size + _KEPT_MLP * config.intermediate_size
        if stage.config.recompute:  # every block's input, and one block in full
            return 2.0 * tokens * (config.num_layers * config.hidden_size + width)
        return 2.0 * tokens * config.num_layers * width

    # The decoder is differentiated through whenever the image decides, trained or not; the MLLM where it trains.
    kept = stack(model.decoder.stack, text_tokens + 1 + image_tokens) + stack(model.connector.stack, text_tokens)
    if any(p.requires_grad for p in stage.model.language.parameters()):
        kept += stack(model.language.stack, text_tokens) + 6.0 * text_tokens * model.language.vocab_size
    return kept


def parameter_table(stage: Stage) -> list[tuple[str, int, int]]:
    """(name, trained, frozen) parameters; layers of a stack are summed under `N`."""
    import re

    rows: dict[str, list[int]] = {}
    for name, parameter in stage.model.named_parameters():
        short = re.sub(r"\.\d+\.", ".N.", name)
        row = rows.setdefault(short, [0, 0])
        row[0 if parameter.requires_grad else 1] += parameter.numel()
    return [(n, t, f) for n, (t, f) in rows.items()]


def report(config: Config, model_config: ModelConfig | None = None, gpus: Sequence[int] = (1, 8)) -> str:
    """The dry run as text: parameters by name, then the memory plan."""
    stage = meta_stage(config, model_config)
    table = parameter_table(stage)
    trained, frozen = sum(t for _, t, _ in table), sum(f for _, _, f in table)
    lines = [
        f"stage {config.stage}: {trained / 1e6:,.1f} M parameters train, {frozen / 1e6:,.1f} M are frozen",
        "trained:",
    ]
    lines += [f"  {t:>15,}  {n}" for n, t, _ in table if t]
    lines.append("frozen:")
    for part in ("vision", "language", "connector", "decoder", "vae"):
        count = sum(f for n, _, f in table if n.startswith(f"{part}."))
        if count:
            lines.append(f"  {count:>15,}  {part}.*")
    lines.append(
        f"GiB of each GPU (predicted; batch {config.optim.batch}, {config.data.image_size} pixels, 512 text tokens)"
    )
    names = [f.name for f in dataclasses.fields(Plan)][1:]
    lines.append("  " + "  ".join(f"{n:>11}" for n in ("GPUs", *names, "total")))
    for count in gpus:
        plan = memory_plan(stage, count)
        values = [getattr(plan, n) for n in names]
        lines.append("  " + "  ".join(f"{v:>11}" for v in (str(count), *(f"{x:.1f}" for x in (*values, plan.total)))))
    return "\n".join(lines)


def gpu_step(
    pretrain: Config,
    rgpo: Config,
    model_config: ModelConfig | None = None,
    device: str = "cuda",
    store: Callable[[dict[str, dict[str, Any]]], None] = lambda results: None,
) -> dict[str, dict[str, Any]]:
    """One step of stage 1 and one of RGPO on random weights: seconds and peak GiB of each, and whether its gradient is
    right, judged by its distance from float32's.

    The second of two equal steps is timed. A stage that fails is recorded and the other runs; `store` gets all results
    after each part. Raises UnsupportedDeviceError without a CUDA device.
    """
    where = torch.device(device)
    if where.type == "cuda" and not torch.cuda.is_available():
        raise UnsupportedDeviceError(
            "--gpu-step needs a CUDA device, and this PyTorch finds none; the dry run does not"
        )
    results: dict[str, dict[str, Any]] = {}
    keep, sizes = partial(store, results), model_config or full_config()
    for config in (pretrain, rgpo):
        found = results[config.stage] = {}
        try:
            _measure(dataclasses.replace(config, device=device), sizes, where, found, keep)
        except Exception as error:  # noqa: BLE001  # minutes on a borrowed GPU: the other stage must still run
            found["failed"] = described(error)
        keep()
        gc.collect()
        if where.type == "cuda":
            torch.cuda.empty_cache()
    return results


def _measure(
    config: Config, sizes: ModelConfig, where: torch.device, found: dict[str, Any], keep: Callable[[], None]
) -> None:
    """Fills `found`: times first, stored before the reference in float32, which may not fit."""
    cuda = where.type == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        stage = _random_stage(config, sizes, where, Path(folder))
        chosen = stage.choose_trainable()
        optimizer = torch.optim.AdamW(chosen.values(), lr=1e-5)
        for turn in range(2):
            if cuda:
                torch.cuda.reset_peak_memory_stats(where)
            seconds, loss = _step(stage, optimizer, config, turn)
        found |= {"seconds": seconds, "loss": loss, "device": torch.cuda.get_device_name(where) if cuda else "cpu"}
        if cuda:  # reserved counts what the allocator holds beside tensors
            peaks = torch.cuda.max_memory_allocated(where), torch.cuda.max_memory_reserved(where)
            found |= dict(zip(("peak_gib", "reserved_gib"), (peak / GIB for peak in peaks), strict=True))
        keep()
        if config.wants_bf16(where.type):
            found |= _judgement(stage, config)


def _judgement(stage: Stage, config: Config) -> dict[str, Any]:
    """The gradient of one micro-batch in 16 bits, by its distance from that of the same batch in float32.

    Of RGPO that of the chosen tokens' probabilities: advantages cancel each other, and how far a policy is from its own
    reference is rounding alone.
    """
    stage.config = dataclasses.replace(config, rgpo=dataclasses.replace(config.rgpo, beta_text=0.0, beta_image=0.0))
    prepared = _prepared(stage, config, 2)
    if hasattr(prepared, "advantages"):
        prepared.advantages = torch.ones_like(prepared.advantages)
    ours = _gradient(stage, prepared)
    stage.config = dataclasses.replace(stage.config, precision="fp32")
    stage.model.float()
    exact = _gradient(stage, prepared)
    # One tensor at a time: billions of numbers would not fit in float64.
    squares = [
        ((a.double() - b.double()).square().sum(), b.double().square().sum()) for a, b in zip(ours, exact, strict=True)
    ]
    lost, whole = (math.fsum(float(part) for part in parts) for parts in zip(*squares, strict=True))
    return judged(math.sqrt(lost / whole), GRADIENT)


def _gradient(stage: Stage, prepared: Any) -> list[torch.Tensor]:
    """Of each tensor that trains, on the host."""
    stage.zero_grad(set_to_none=True)
    stage("terms", prepared).total.backward()
    return [p.grad.cpu() for p in stage.parameters() if p.grad is not None]


def _random_stage(config: Config, model_config: ModelConfig, device: torch.device, folder: Path) -> Stage:
    from .stages.pretrain import Pretrain
    from .stages.rgpo import Rgpo

    write_tokenizer(folder, ["draw", "a", "cat", "on", "the", "moon"])
    model = random_model(model_config, torch.bfloat16, device).train()
    model.vae.float()
    contexts = Contexts(model, Chat(folder), config.data.image_size, device=device)
    if config.stage == "rgpo":
        names = dict.fromkeys(config.rgpo.rewards, _length_reward)
        return Rgpo(model, contexts, config, names)
    return Pretrain(model, contexts, config)


def _length_reward(rollouts: Sequence[Any]) -> NDArray[np.float64]:
    return np.array([float(len(set(r.token_ids))) for r in rollouts])


def _prepared(stage: Stage, config: Config, turn: int) -> Any:
    """What the stage makes of a batch of one record, repeated."""
    size, count = config.data.image_size, config.optim.batch
    pixels = np.random.default_rng(0).integers(0, 255, (size, size, 3), dtype=np.uint8)
    record = Record(instruction="draw a cat on the moon", output_image=pixels, gt_prompt="a cat on the moon")
    stage.eval()
    prepared = stage("prepare", [record] * count, Draws(0, turn, 0, count, 0, count))
    stage.train()
    return prepared


def _step(stage: Stage, optimizer: torch.optim.Optimizer, config: Config, turn: int) -> tuple[float, float]:
    began = time.perf_counter()
    prepared = _prepared(stage, config, turn)
    optimizer.zero_grad(set_to_none=True)
    terms = stage("terms", prepared)
    terms.total.backward()
    nn.utils.clip_grad_norm_([p for p in stage.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    loss = float(terms.total.detach())
    if stage.contexts.device.type == "cuda":
        torch.cuda.synchronize(stage.contexts.device)
    return time.perf_counter() - began, loss
