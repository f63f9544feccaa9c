"""The configuration of a run: frozen dataclasses, read from a TOML file and key=value overrides.

An unknown key is an error. The comment behind each field is its line in docs/training-configuration.md.
"""

from __future__ import annotations

import dataclasses
import math
import tomllib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from mindomni_rt.files import read_text, why

from .errors import BadConfigError

STAGES = ("prior", "pretrain", "sft", "rgpo")
SFT_RANK = 16  # of LoRA on the decoder, as released
CONFIGS = Path(__file__).with_name("configs")
"""Configurations that the package holds: NAME.toml. `load_config` takes their names as paths."""


def _choice(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise BadConfigError(f"{name} = {value!r}: expected one of {', '.join(allowed)}")


def _at_least(name: str, value: float, least: float) -> None:
    if value < least:
        raise BadConfigError(f"{name} = {value}: expected at least {least}")


def _share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise BadConfigError(f"{name} = {value}: expected a share in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where records come from, and how large the images are."""

    source: str = "world"  # "world" (the synthetic task), "jsonl" or "webdataset"
    split: str = ""  # mixture of the synthetic task; empty is that of the stage
    paths: tuple[str, ...] = ()  # files of records: JSON lines, YAML lists of them, or shards; with {000..127}, *, ?
    image_root: str = ""  # folder of relative image paths; empty is the folder of the JSON lines file
    image_size: int = 256  # side in pixels of the target images; a multiple of 16
    shuffle: int = 1000  # records in the shuffle buffer of webdataset shards
    validation: tuple[str, ...] = ()  # as `paths`: records for evaluation only
    cache_latents: str = ""  # folder that keeps VAE latents between epochs and runs
    drop: float = 0.0  # share of conversations replaced by one of `drop_prompts`, for classifier-free guidance
    drop_prompts: tuple[str, ...] = ("<cfg>",)  # texts that stand for "no condition"

    def __post_init__(self) -> None:
        _choice("data.source", self.source, ("world", "jsonl", "webdataset"))
        if self.source != "world" and not self.paths:
            raise BadConfigError(f"data.source = {self.source!r} needs data.paths")
        if self.image_size % 16 or self.image_size <= 0:
            raise BadConfigError(f"data.image_size = {self.image_size}: expected a positive multiple of 16")
        _share("data.drop", self.drop)
        if self.drop and not self.drop_prompts:
            raise BadConfigError(f"data.drop = {self.drop} needs a text in data.drop_prompts")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW, its schedule, and the records of a step: `batch` times `accumulate`."""

    steps: int = 1000  # optimizer steps of the run
    batch: int = 16  # records of a micro-batch, over all processes together
    accumulate: int = 1  # micro-batches of a step
    lr: float = 1e-4  # peak learning rate
    weight_decay: float = 0.0  # of AdamW
    beta1: float = 0.9  # of AdamW
    beta2: float = 0.999  # of AdamW
    eps: float = 1e-8  # of AdamW
    warmup: int = 0  # steps of linear warm-up
    schedule: str = "constant"  # after the warm-up: "constant", "cosine" or "linear", from lr to lr * final
    final: float = 0.0  # learning rate at the end, as a share of lr
    clip: float = 1.0  # largest gradient norm; 0 does not clip
    ema: float = 0.0  # decay of the weights' moving average, which is exported; 0 keeps none

    def __post_init__(self) -> None:
        _choice("optim.schedule", self.schedule, ("constant", "cosine", "linear"))
        for name in ("steps", "batch", "accumulate"):
            _at_least(f"optim.{name}", getattr(self, name), 1)
        for name in ("lr", "weight_decay", "eps", "warmup", "final", "clip"):
            _at_least(f"optim.{name}", getattr(self, name), 0)
        for name in ("beta1", "beta2", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise BadConfigError(f"optim.{name} = {getattr(self, name)}: expected a decay in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """LoRA through peft, in stages sft (decoder) and rgpo (MLLM)."""

    rank: int | None = None  # unset is 16 in stage sft and 0 in stage rgpo; 0 trains the weights themselves
    alpha: float = 0.0  # scale of the update is alpha / rank; 0 is the rank
    dropout: float = 0.0  # share of the adapter's inputs set to zero
    targets: tuple[str, ...] = ()  # names of Linear layers; empty is those of the stage
    init: str = "default"  # "default" (Kaiming) or "gaussian", of the first factor

    def __post_init__(self) -> None:
        _at_least("lora.rank", self.rank or 0, 0)
        _at_least("lora.alpha", self.alpha, 0)
        if not 0 <= self.dropout < 1:
            raise BadConfigError(f"lora.dropout = {self.dropout}: expected a share in [0, 1)")
        _choice("lora.init", self.init, ("default", "gaussian"))


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Feature distillation from the frozen decoder fed with its own text path (stages pretrain and sft)."""

    weight: float = 0.0  # of the feature KL, a mean over tokens and layers; the paper's 1.0 at 256 pixels is 256

    def __post_init__(self) -> None:
        _at_least("distill.weight", self.weight, 0)


@dataclass(frozen=True, kw_only=True)
class PriorConfig:
    """Stage prior (ours): the decoder's own text path, and the MLLM."""

    paint: float = 1.0  # weight of the flow loss
    text: float = 1.0  # weight of the cross-entropy
    rounds: str = "both"  # what trains: "paint" (decoder), "text" (MLLM) or "both"

    def __post_init__(self) -> None:
        _at_least("prior.paint", self.paint, 0)
        _at_least("prior.text", self.text, 0)
        _choice("prior.rounds", self.rounds, ("both", "paint", "text"))


@dataclass(frozen=True, kw_only=True)
class SftConfig:
    """Stage sft."""

    decoder: str = "lora"  # what of the decoder trains: "lora", "full" or "none"
    text: float = 0.0  # weight of the cross-entropy on thoughts and replies; above 0 the MLLM trains too

    def __post_init__(self) -> None:
        _choice("sft.decoder", self.decoder, ("lora", "full", "none"))
        _at_least("sft.text", self.text, 0)


@dataclass(frozen=True, kw_only=True)
class RgpoConfig:
    """Stage rgpo: rollouts, rewards and the two KL terms."""

    group: int = 4  # rollouts of a prompt
    updates: int = 1  # optimizer steps on a set of rollouts; above 1 the ratio leaves 1 and the clip acts
    temperature: float = 1.0  # of sampled text
    max_new_tokens: int = 512  # of sampled text
    image_steps: int | None = None  # Euler steps of an image; unset is the model's own
    guidance: float | None = None  # scale of classifier-free guidance, 1 is none; unset is the model's own
    same_noise: bool = True  # all rollouts of a step start from the same noise, as released
    rewards: tuple[str, ...] = ("format", "consistency")  # names, or module:function of your own
    weights: tuple[float, ...] = ()  # of the rewards; empty is 1.0 each
    scale_advantages: bool = True  # divide advantages by the standard deviation of their group
    clip_low: float = 0.2  # the ratio is clipped to [1 - clip_low, 1 + clip_high]
    clip_high: float = 0.2  # see clip_low
    beta_text: float = 0.01  # weight of the KL of tokens
    text_estimator: str = "k3"  # of the KL of tokens: "k1", "k2" or "k3"
    beta_image: float = 61.44  # weight of the image KL, a mean over tokens; the paper's 0.06 at 512 pixels is 61.44
    image_term: str = "features"  # what the image KL compares: "features" or "velocity"
    replay: int = 0  # plain captions of a step that enter the image KL too (ours; 0 as published)
    dump_every: int = 50  # steps between saved rollouts (texts, rewards, images); 0 saves none
    reward_model: str = ""  # CLIP of the consistency reward: a folder or hub id

    def __post_init__(self) -> None:
        _at_least("rgpo.group", self.group, 2)
        for name in ("updates", "max_new_tokens", "image_steps"):
            _at_least(f"rgpo.{name}", 1 if getattr(self, name) is None else getattr(self, name), 1)
        for name in ("clip_low", "clip_high", "beta_text", "beta_image", "replay", "dump_every"):
            _at_least(f"rgpo.{name}", getattr(self, name), 0)
        if self.temperature <= 0:
            raise BadConfigError(f"rgpo.temperature = {self.temperature}: expected more than 0, rollouts must differ")
        _choice("rgpo.text_estimator", self.text_estimator, ("k1", "k2", "k3"))
        _choice("rgpo.image_term", self.image_term, ("features", "velocity"))
        if not self.rewards:
            raise BadConfigError("rgpo.rewards is empty: expected at least one reward")
        if self.weights and len(self.rewards) != len(self.weights):
            raise BadConfigError(
                f"rgpo.rewards and rgpo.weights: {len(self.rewards)} rewards and {len(self.weights)} weights"
            )

    def weighted(self) -> list[tuple[str, float]]:
        """Each reward with its weight."""
        return list(zip(self.rewards, self.weights or (1.0,) * len(self.rewards), strict=True))


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run of one stage."""

    stage: str  # "prior", "pretrain", "sft" or "rgpo"
    model: str  # checkpoint to start from: a folder, a hub id, or demo (the small model)
    out: str  # run folder: logs, checkpoints, and the trained model under `model/`
    seed: int = 0  # of data order, noise, times, sampled text and adapters
    device: str = "auto"  # "cpu", "cuda", "cuda:1"; auto is CUDA where there is one
    precision: str = "auto"  # of the forward pass: "bf16" (autocast), "fp32"; auto is bf16 on CUDA
    save_every: int = 500  # steps between checkpoints
    keep: int = 2  # checkpoints kept
    log_every: int = 1  # steps between lines of metrics.jsonl
    recompute: bool = False  # recompute the activations of each block in the backward pass, to save memory
    evaluate_every: int = 0  # steps between evaluations; above 0 also before the first and after the last step
    evaluate_count: int = 96  # prompts of a suite, or records of data.validation
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
        for name in ("model", "out"):
            if not getattr(self, name):
                raise BadConfigError(f"{name} is empty: expected a folder")
        if not 0 <= self.seed < 2**32:
            raise BadConfigError(f"seed = {self.seed}: expected 0 to {2**32 - 1}")
        for name in ("keep", "save_every", "log_every", "evaluate_count"):
            _at_least(name, getattr(self, name), 1)
        _at_least("evaluate_every", self.evaluate_every, 0)
        if self.evaluate_every and self.data.source != "world" and not self.data.validation:
            raise BadConfigError("evaluate_every needs data.validation: records that are not trained on")
        if self.stage == "sft" and self.sft.decoder == "lora" and self.lora.rank == 0:
            raise BadConfigError("lora.rank = 0 and sft.decoder = 'lora': set a rank, or sft.decoder = 'full'")

    def wants_bf16(self, device: str) -> bool:
        """Whether forwards compute in bf16 on a kind of device ("cpu", "cuda")."""
        return self.precision == "bf16" or (self.precision == "auto" and device == "cuda")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able data."""
        return asdict(self)


def load_config(path: Path | None, overrides: Sequence[str] = (), **defaults: Any) -> Config:
    """A configuration from a TOML file, `key=value` overrides (dots reach into tables) and defaults below both.

    path: a file, or the name of one in `CONFIGS`, such as "shapes-sft".
    Values are read as TOML; what does not parse is a string. Raises BadConfigError naming the key, and the file or
    override that holds it.
    """
    data: dict[str, Any] = dict(defaults)
    if path is not None:
        data.update(_read(_find(path)))
    given: dict[str, str] = {}
    for item in overrides:
        key, sign, value = item.partition("=")
        key = key.strip()
        if not sign or not key:
            raise BadConfigError(f"{item!r}: overrides are written key=value, e.g. optim.lr=1e-4")
        _assign(data, key, _value(value.strip()), item)
        given[key] = item

    def origin(message: str) -> str:
        """Where a mistake was made: the override whose key the message names, else the file."""
        named = [item for key, item in given.items() if message.startswith(key) or f" {key}" in message]
        return f"{named[0]!r} on the command line" if named else str(path or "the command line")

    built = build(Config, data, origin)
    assert isinstance(built, Config)
    return built


def named_configs() -> list[str]:
    """Names of the configurations that the package holds."""
    return sorted(path.stem for path in CONFIGS.glob("*.toml"))


def _find(path: Path) -> Path:
    """The file itself, or the package's one of that name where there is no such file."""
    named = CONFIGS / f"{path.name}.toml"
    return named if not path.is_file() and path.name == str(path) and named.is_file() else path


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(read_text(path))
    except OSError as error:
        names = ", ".join(named_configs())
        raise BadConfigError(f"{path}: {why(error)}; expected a TOML file or one of {names}") from error
    except ValueError as error:  # TOMLDecodeError, UnicodeDecodeError, numbers of thousands of digits
        raise BadConfigError(f"{path} is not valid TOML: {error}") from error
    except RecursionError as error:
        raise BadConfigError(f"{path} is not valid TOML: nested too deep") from error


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"x = {text}")["x"]
    except (ValueError, RecursionError):
        return text


def _assign(data: dict[str, Any], key: str, value: Any, item: str) -> None:
    *tables, last = key.split(".")
    for table in tables:
        data = data.setdefault(table, {})
        if not isinstance(data, dict):
            raise BadConfigError(f"{item!r} on the command line: {table} is a value, not a table")
    data[last] = value


def build(kind: type, data: Mapping[str, Any], where: str | Callable[[str], str], prefix: str = "") -> Any:
    """A dataclass from a mapping, nested ones from tables; unknown, missing and mistyped keys raise BadConfigError.

    where: the place of a mistake for its message, or a function of the message that gives it.
    """

    def fail(message: str, cause: Exception | None = None) -> typing.NoReturn:
        raise BadConfigError(f"{where if isinstance(where, str) else where(message)}: {message}") from cause

    known = {f.name: f for f in fields(kind)}
    hints = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    for key, value in data.items():
        name = f"{prefix}{key}"
        if key not in known:
            fail(f"unknown key {name}; known here are {', '.join(sorted(known))}")
        hint = hints[key]
        if is_dataclass(hint):
            if not isinstance(value, Mapping):
                fail(f"{name} is a table, found {value!r}")
            values[key] = build(typing.cast(type, hint), value, where, f"{name}.")
            continue
        try:
            values[key] = _typed(hint, value, name)
        except BadConfigError as error:
            fail(str(error), error)
    required = {
        n for n, f in known.items() if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    missing = sorted(required - set(values))
    if missing:
        fail(f"{prefix}{missing[0]} is missing")
    try:
        return kind(**values)
    except BadConfigError as error:
        fail(str(error), error)


def _typed(hint: Any, value: Any, name: str) -> Any:
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)[0]
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_typed(inner, item, name) for item in items)
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        hint = typing.get_args(hint)[0]
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 2**1000 else math.inf
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise BadConfigError(f"{name} = {value!r}: expected {hint.__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise BadConfigError(f"{name} = {value}: expected a finite number")
    return value
