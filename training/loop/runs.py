"""From a configuration to a running stage, and from a finished stage to a model in the published layout."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mindomni_rt.checkpoint.config import RecommendedConfig
from mindomni_rt.checks import shown
from mindomni_rt.errors import BadRequestError, UnsupportedDeviceError
from mindomni_rt.inputs.prompts import Chat
from mindomni_rt.loading import resolve_checkpoint
from mindomni_rt.model.mindomni import load_model

from ..adapter_folder import save_adapter
from ..config import Config, DataConfig
from ..data.record import Stream
from ..data.records import open_stream
from ..data.world.scene import SIDE
from ..errors import BadConfigError
from ..outputs import save_checkpoint
from ..stages.adapters import merge_adapters
from ..stages.base import Draws, Stage
from ..stages.contexts import Contexts
from ..suites import Settings, evaluate
from .checkpointing import full_tensor
from .sharding import start_processes, world
from .trainer import Trainer

if TYPE_CHECKING:
    from ..stages.rgpo import Reward

logger = logging.getLogger(__name__)


def choose_device(name: str) -> torch.device:
    """A configuration's device; under torchrun each process takes the GPU of its local rank. Raises BadRequestError,
    UnsupportedDeviceError."""
    import os

    if not re.fullmatch(r"auto|(cpu|cuda)(:\d{1,3})?", name):
        raise BadRequestError(f"device {shown(name)}: expected auto, cpu, cuda or cuda:N")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UnsupportedDeviceError("device 'cuda': this PyTorch finds no CUDA device; use device=cpu")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
        torch.cuda.set_device(device)
    return device


def open_contexts(model: str, device: torch.device, image_size: int, cache: str = "", bf16: bool = False) -> Contexts:
    """A checkpoint ready for training: frozen weights in bf16 on request, the VAE always in float32."""
    folder = resolve_checkpoint(model)
    dtype = torch.bfloat16 if bf16 else torch.float32
    loaded, report = load_model(folder, dtype, device, vae_dtype=torch.float32)
    logger.info("%s", report)
    # A float32 checkpoint stays mapped to its file: a run that trains must own its weights.
    for parameter in loaded.parameters():
        parameter.data = parameter.data.clone()
    return Contexts(loaded, Chat(folder / "mllm"), image_size, device=device, cache=cache)


def make_stage(config: Config, contexts: Contexts) -> Stage:
    """The stage that a configuration names, over a model."""
    if config.stage == "rgpo":
        from ..stages.rgpo import Rgpo

        return Rgpo(contexts.model, contexts, config, make_rewards(config, contexts))
    if config.stage == "sft":
        from ..stages.sft import Sft

        return Sft(contexts.model, contexts, config)
    if config.stage == "pretrain":
        from ..stages.pretrain import Pretrain

        return Pretrain(contexts.model, contexts, config)
    from ..stages.prior import Prior

    return Prior(contexts.model, contexts, config)


def start(config: Config, bar: bool = True) -> Trainer:
    """Loads model and data and makes the trainer. Raises BadConfigError, BadCheckpointError, UnsupportedDeviceError."""
    device = choose_device(config.device)
    start_processes(device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    bf16 = config.wants_bf16(device.type)
    contexts = open_contexts(config.model, device, config.data.image_size, config.data.cache_latents, bf16)
    stage = make_stage(config, contexts)
    return Trainer(config, stage, make_stream(config), evaluate=make_evaluation(config), bar=bar)


def finish(trainer: Trainer) -> Path:
    """The finished model in the published layout under `out/model`: averaged weights, adapters merged.

    The adapters of a LoRA run are also stored by themselves, under `out/adapter`.
    """
    stage, out = trainer.stage, Path(trainer.config.out) / "model"
    trainer.use_average()
    if trainer.processes > 1:
        state = {n: full_tensor(p, keep=trainer.rank == 0) for n, p in trainer.trained.items()}
        if trainer.rank:
            return out
        # The gathered weights go into a fresh copy that is not sharded. Frozen weights have not changed.
        single = replace(trainer.config, device="cpu", precision="fp32")
        bf16 = trainer.config.wants_bf16(stage.contexts.device.type)
        contexts = open_contexts(single.model, torch.device("cpu"), single.data.image_size, bf16=bf16)
        stage = make_stage(single, contexts)
        with torch.no_grad():
            for name, parameter in stage.choose_trainable().items():
                parameter.copy_(state[name])
    weights = {n: p for n, p in stage.model.named_parameters() if n in trainer.trained}
    save_adapter(stage, weights, out.parent / "adapter", trainer.config.model)
    merge_adapters(stage.model)
    if any(name.startswith("decoder.") for name in trainer.trained):
        recommended = trained_for(stage.model.config.recommended, trainer.config.data.image_size)
        stage.model.config = replace(stage.model.config, recommended=recommended)
    save_checkpoint(stage.model, out, resolve_checkpoint(trainer.config.model))
    return out


def trained_for(before: RecommendedConfig, side: int) -> RecommendedConfig:
    """A model's own settings after its decoder was trained at a size: that size, and a range that holds it."""
    low, high = before.trained_sides or (side, side)
    return replace(before, width=side, height=side, trained_sides=(min(low, side), max(high, side)))


def make_stream(config: Config) -> Stream:
    """The records of a configuration. Every process reads all of them; the loop takes the slice of each."""
    return open_stream(config.data, config.stage, config.seed)


def make_evaluation(config: Config) -> Callable[[Stage], dict[str, float]] | None:
    """The evaluation during a run: suites of the world, or loss terms of the validation records; None without."""
    if not config.evaluate_every:
        return None
    if config.data.source == "world":
        if config.data.image_size != SIDE:
            raise BadConfigError(
                f"evaluate_every = {config.evaluate_every}: the verifier of the synthetic world reads images of {SIDE} "
                f"pixels; set data.image_size={SIDE}, or evaluate_every=0"
            )
        return partial(_suites, config)
    held = replace(config.data, paths=config.data.validation, drop=0.0)
    return partial(_validate, config, held)


def _suites(config: Config, stage: Stage) -> dict[str, float]:
    wanted = {
        "prior": ("teacher", "questions"),
        "pretrain": ("captions",),
        "sft": ("riddles", "direct", "captions"),
        "rgpo": ("riddles", "direct", "captions", "questions"),
    }[config.stage]
    found = evaluate(stage.contexts, wanted, Settings(n=config.evaluate_count))
    return {
        f"{suite}/{name}": value["share"] if isinstance(value, dict) else value
        for suite, scores in found.items()
        for name, value in scores.items()
    }


@torch.no_grad()
def _validate(config: Config, held: DataConfig, stage: Stage) -> dict[str, float]:
    """Loss terms of the first evaluate_count records, at noise and times that are the same every time."""
    stream, batch = open_stream(held, config.stage, 0), config.optim.batch
    rank, processes = world()
    here = batch // processes
    rounds = max(1, config.evaluate_count // batch)
    whole = [(stream.next_batch(batch), Draws(0, index, 0, batch, 0, batch)) for index in range(rounds)]
    stage.begin_step(whole, processes)
    sums: dict[str, float] = {}
    for index, (records, _) in enumerate(whole):
        mine = records[rank * here : (rank + 1) * here]
        terms = stage.terms(stage.prepare(mine, Draws(0, index, 0, batch, rank * here, here)))
        for name, value in {**{n: t.item() for n, t in terms.parts.items()}, **terms.figures}.items():
            sums[name] = sums.get(name, 0.0) + value / rounds
    stage.begin_step((), processes)
    return sums


def make_rewards(config: Config, contexts: Contexts) -> dict[str, Reward]:
    """The rewards that a configuration names, ready to score."""
    from ..stages import rewards

    device = str(contexts.device)
    return {name: rewards.make(name, model=config.rgpo.reward_model, device=device) for name in config.rgpo.rewards}
