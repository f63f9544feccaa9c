"""What a run is made of: frozen dataclasses from a TOML file and key=value overrides. An unknown key is an error."""

from __future__ import annotations

import dataclasses
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from .errors import BadConfigError

STAGES = ("prior", "pretrain", "sft", "rgpo")


def _choice(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise BadConfigError(f"{name} = {value!r}: expected one of {', '.join(allowed)}")


def _at_least(name: str, value: float, least: float) -> None:
    if value < least:
        raise BadConfigError(f"{name} = {value}: expected at least {least}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where records come from and how large their images are.

    source: "world" (the synthetic task; `split` names its mixture), "jsonl" or "webdataset" (`paths`).
    """

    source: str = "world"
    split: str = ""  # empty is the stage's own
    paths: tuple[str, ...] = ()
    image_root: str = ""
    image_size: int = 256  # pixels a side of the images painted; multiple of 16
    shuffle: int = 1000  # records held for shuffling
    validation: tuple[str, ...] = ()  # as `paths`: records that are evaluated, never trained on
    cache_latents: str = ""  # folder that keeps VAE latents between epochs
    drop: float = 0.0  # share of contexts replaced by `drop_prompts`, for guidance
    drop_prompts: tuple[str, ...] = ("<cfg>",)

    def __post_init__(self) -> None:
        _choice("data.source", self.source, ("world", "jsonl", "webdataset"))
        if self.source != "world" and not self.paths:
            raise BadConfigError(f"data.source = {self.source!r} needs data.paths")
        if self.image_size % 16 or self.image_size <= 0:
            raise BadConfigError(f"data.image_size = {self.image_size}: expected a positive multiple of 16")
        if not 0 <= self.drop <= 1:
            raise BadConfigError(f"data.drop = {self.drop}: expected a share in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW, its schedule, and the shape of a step: batch records for each forward, accumulate forwards for a step."""

    steps: int = 1000
    batch: int = 16  # records of one forward over all processes
    accumulate: int = 1
    lr: float = 1e-4
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    warmup: int = 0
    schedule: str = "constant"  # or "cosine", "linear": from lr to lr * final after the warm-up
    final: float = 0.0
    clip: float = 1.0
    ema: float = 0.0  # decay a step; 0 keeps no average

    def __post_init__(self) -> None:
        _choice("optim.schedule", self.schedule, ("constant", "cosine", "linear"))
        for name in ("steps", "batch", "accumulate"):
            _at_least(f"optim.{name}", getattr(self, name), 1)
        if not 0 <= self.ema < 1:
            raise BadConfigError(f"optim.ema = {self.ema}: expected a decay in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """LoRA through peft. rank 0 trains the weights themselves."""

    rank: int = 0
    alpha: float = 0.0  # 0 is the rank
    dropout: float = 0.0
    targets: tuple[str, ...] = ()  # names of Linear layers; empty is the stage's own
    init: str = "default"  # or "gaussian"

    def __post_init__(self) -> None:
        _at_least("lora.rank", self.rank, 0)
        _choice("lora.init", self.init, ("default", "gaussian"))


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Feature KL to the frozen decoder fed with its own text path; weight in units of a mean over tokens and layers."""

    weight: float = 0.0


@dataclass(frozen=True, kw_only=True)
class PriorConfig:
    """Weights of what our stage 0 trains: the decoder's own text path and the MLLM's prior."""

    paint: float = 1.0
    text: float = 1.0
    rounds: str = "both"  # or "paint", "text": which half this run trains

    def __post_init__(self) -> None:
        _choice("prior.rounds", self.rounds, ("both", "paint", "text"))


@dataclass(frozen=True, kw_only=True)
class SftConfig:
    """decoder: what of it trains. text: weight of the cross-entropy on the MLLM, which trains above 0 (published)."""

    decoder: str = "lora"  # or "full", "none"
    text: float = 0.0

    def __post_init__(self) -> None:
        _choice("sft.decoder", self.decoder, ("lora", "full", "none"))
        _at_least("sft.text", self.text, 0)


@dataclass(frozen=True, kw_only=True)
class RgpoConfig:
    """Rollouts, rewards and the two KLs. beta_image is per token: 0.06 at 512 pixels is 61.44."""

    group: int = 4
    updates: int = 1  # passes over a set of rollouts; above 1 the ratio leaves 1 and the clip acts
    temperature: float = 1.0
    max_new_tokens: int = 512
    image_steps: int = 50
    guidance: float = 3.0
    same_noise: bool = True  # all rollouts of a step start from one noise, as released
    rewards: tuple[str, ...] = ("format", "consistency")
    weights: tuple[float, ...] = (1.0, 1.0)
    scale_advantages: bool = True
    clip_low: float = 0.2
    clip_high: float = 0.2
    beta_text: float = 0.01
    text_estimator: str = "k3"
    beta_image: float = 61.44
    image_term: str = "features"  # or "velocity"
    replay: int = 0  # plain captions a step whose condition D_I also holds still (ours; 0 as published)
    dump_every: int = 50  # steps between rollout dumps; 0 for none
    reward_model: str = ""  # folder of the consistency reward's model

    def __post_init__(self) -> None:
        _at_least("rgpo.group", self.group, 2)
        _at_least("rgpo.updates", self.updates, 1)
        _choice("rgpo.text_estimator", self.text_estimator, ("k1", "k2", "k3"))
        _choice("rgpo.image_term", self.image_term, ("features", "velocity"))
        if len(self.rewards) != len(self.weights) or not self.rewards:
            raise BadConfigError(f"rgpo: {len(self.rewards)} rewards and {len(self.weights)} weights")


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run of one stage."""

    stage: str
    model: str  # checkpoint folder or hub id to start from
    out: str  # run folder: logs, checkpoints, and the model in the published layout under `model/`
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"  # of the forward pass: "bf16" by autocast, "fp32"; auto is bf16 on CUDA
    save_every: int = 500
    keep: int = 2
    log_every: int = 1
    recompute: bool = False  # activations of each block once more in the backward pass instead of keeping them
    evaluate_every: int = 0  # steps; above 0 also before the first and after the last
    evaluate_count: int = 96  # prompts a suite, or records of data.validation
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    lora: AdapterConfig = field(default_factory=AdapterConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    prior: PriorConfig = field(default_factory=PriorConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    rgpo: RgpoConfig = field(default_factory=RgpoConfig)

    def __post_init__(self) -> None:
        _choice("stage", self.stage, STAGES)
        _choice("precision", self.precision, ("auto", "bf16", "fp32"))
        _at_least("keep", self.keep, 1)
        _at_least("save_every", self.save_every, 1)
        _at_least("evaluate_count", self.evaluate_count, 1)
        if self.evaluate_every and self.data.source != "world" and not self.data.validation:
            raise BadConfigError("evaluate_every needs data.validation: records that are not trained on")

    def wants_bf16(self, device: str) -> bool:
        """Whether forwards compute in bf16 on a kind of device ("cpu", "cuda")."""
        return self.precision == "bf16" or (self.precision == "auto" and device == "cuda")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able data."""
        return asdict(self)


def load_config(path: Path | None, overrides: Sequence[str] = (), **defaults: Any) -> Config:
    """A configuration from a TOML file, `key=value` overrides (dots reach into tables) and defaults below both.

    Values are read as TOML; what does not parse is a string. Raises BadConfigError naming file and key.
    """
    data: dict[str, Any] = dict(defaults)
    where = "the command line"
    if path is not None:
        where = str(path)
        try:
            read = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise BadConfigError(f"{path}: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise BadConfigError(f"{path} is not valid TOML: {error}") from error
        data.update(read)
    for item in overrides:
        key, sign, value = item.partition("=")
        if not sign or not key:
            raise BadConfigError(f"{item!r}: overrides are written key=value, e.g. optim.lr=1e-4")
        _assign(data, key.strip(), _value(value.strip()))
    built = build(Config, data, where)
    assert isinstance(built, Config)
    return built


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        return text


def _assign(data: dict[str, Any], key: str, value: Any) -> None:
    *tables, last = key.split(".")
    for table in tables:
        data = data.setdefault(table, {})
        if not isinstance(data, dict):
            raise BadConfigError(f"{key}: {table} is a value, not a table")
    data[last] = value


def build(kind: type, data: Mapping[str, Any], where: str, prefix: str = "") -> Any:
    """A dataclass from a mapping, nested ones from tables; unknown, missing and mistyped keys raise BadConfigError."""
    known = {f.name: f for f in fields(kind)}
    hints = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    for key, value in data.items():
        name = f"{prefix}{key}"
        if key not in known:
            near = ", ".join(sorted(known))
            raise BadConfigError(f"{where}: unknown key {name}; known here are {near}")
        hint = hints[key]
        if is_dataclass(hint):
            if not isinstance(value, Mapping):
                raise BadConfigError(f"{where}: {name} is a table, found {value!r}")
            values[key] = build(typing.cast(type, hint), value, where, f"{name}.")
        else:
            values[key] = _typed(hint, value, f"{where}: {name}")
    required = {
        n for n, f in known.items() if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    missing = sorted(required - set(values))
    if missing:
        raise BadConfigError(f"{where}: {prefix}{missing[0]} is missing")
    try:
        return kind(**values)
    except BadConfigError as error:
        raise BadConfigError(f"{where}: {error}") from error


def _typed(hint: Any, value: Any, name: str) -> Any:
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)[0]
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_typed(inner, item, name) for item in items)
    if isinstance(hint, types.UnionType):
        hint = typing.get_args(hint)[0]
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise BadConfigError(f"{name} = {value!r}: expected {hint.__name__}")
    return value
