"""LoRA adapters at inference: added to the weights while they are loaded, taken away without a trace.

An adapter is a folder as peft writes it: `adapter_config.json` and `adapter_model.safetensors`. The sum of a weight and
its adapters is computed in float32 and rounded once to the weight's type. The original weights are kept aside, so that
unloading restores their bits.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoint.json_files import Keys, read_json
from ...checks import Number, shown
from ...errors import BadCheckpointError, BadRequestError
from ...files import require_regular, why

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
SCALE = Number(-1000, 1000)
# As in the checkpoint's layout: how transformers and OmniGen name the modules of MindOmni's parts.
_SPELLINGS = (
    ("", ""),
    ("model.language_model.", "language."),
    ("language_model.model.", "language."),
    ("model.visual.", "vision."),
    ("visual.", "vision."),
    ("model.", "language."),
    ("llm.", "decoder.llm."),
)
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "use_dora": (False,),
    "lora_bias": (False,),
    "use_qalora": (False,),
}
_ALPHA = Number(-1e6, 1e6)
# Patterns of rank_pattern and alpha_pattern that a search cannot hang on: nothing inside of a repetition repeats.
_PATTERN = re.compile(r"(?:[\w|()^$-]|\\\.|(?:\.|\\d|\[0-9-]+\])[*+]?)*")
_FACTOR = re.compile(r"(.+)\.lora_([AB])\.weight")


@dataclass(frozen=True)
class Factors:
    """One Linear's update: scaling · b @ a, with a (rank, in) and b (out, rank) in float32."""

    a: Tensor
    b: Tensor
    scaling: float

    def delta(self) -> Tensor:
        """The update at scale 1, (out, in) float32."""
        return self.scaling * (self.b @ self.a)


@dataclass(frozen=True)
class Adapter:
    """A read adapter. factors: by the name of the weight; whole: weights that it replaces (peft's modules_to_save)."""

    factors: Mapping[str, Factors]
    whole: Mapping[str, Tensor]

    def changed(self, name: str, base: Tensor, scale: float) -> Tensor:
        """A float32 weight moved by this adapter."""
        if name in self.factors:
            base = base + scale * self.factors[name].delta().to(base.device)
        if name in self.whole:
            wanted = self.whole[name].to(base.device)
            base = wanted if scale == 1 else base + scale * (wanted - base)
        return base

    def names(self) -> set[str]:
        """Weights that it changes."""
        return {*self.factors, *self.whole}


class Adapters:
    """The adapters of one model, by name, in the order of their loading."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._weights = dict(model.named_parameters())
        self._originals: dict[str, Tensor] = {}
        self._loaded: dict[str, tuple[Adapter, float]] = {}

    def scales(self) -> dict[str, float]:
        """Each adapter's scale."""
        return {name: scale for name, (_, scale) in self._loaded.items()}

    def load(self, folder: Path, scale: float, name: str) -> None:
        """Reads an adapter and adds it. Raises BadCheckpointError, BadRequestError; nothing has changed then."""
        if name in self._loaded:
            raise BadRequestError(f"adapter {shown(name)} is loaded already; unload it first, or give another name")
        scale = _checked(scale)
        adapter = read_adapter(folder, self._weights)
        self._loaded[name] = (adapter, scale)
        self._apply(adapter.names())

    def set_scale(self, name: str, scale: float) -> None:
        """Changes how much of an adapter is added; 0 is none of it."""
        adapter, _ = self._find(name)
        self._loaded[name] = (adapter, _checked(scale))
        self._apply(adapter.names())

    def unload(self, name: str) -> None:
        """Takes an adapter away. Weights that no other adapter changes have their original bits again."""
        adapter, _ = self._find(name)
        del self._loaded[name]
        self._apply(adapter.names())

    def _find(self, name: str) -> tuple[Adapter, float]:
        if name not in self._loaded:
            known = ", ".join(self._loaded) or "none"
            raise BadRequestError(f"there is no adapter {shown(name)}; loaded are: {known}")
        return self._loaded[name]

    @torch.no_grad()
    def _apply(self, names: set[str]) -> None:
        for name in names:
            weight = self._weights[name]
            original = self._originals.pop(name, weight.data)
            active = [(a, s) for a, s in self._loaded.values() if name in a.names() and s != 0]
            if not active:
                weight.data = original
                continue
            self._originals[name] = original
            changed = original.float()
            for adapter, scale in active:
                changed = adapter.changed(name, changed, scale)
            weight.data = changed.to(original.dtype)


def _checked(scale: Any) -> float:
    try:
        return SCALE(scale)
    except ValueError as error:
        raise BadRequestError(f"scale = {shown(scale)}: expected {error}") from None


def read_adapter(folder: Path, weights: Mapping[str, Tensor]) -> Adapter:
    """An adapter folder, checked against the weights that it would change. Raises BadCheckpointError by name."""
    config = Keys(read_json(folder / CONFIG), str(folder / CONFIG))
    config.require(_PLAIN)
    if config.get("peft_type") is None:
        raise config.bad("peft_type", "LORA")
    tensors = _read_tensors(folder / WEIGHTS)
    pairs: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        found = _FACTOR.fullmatch(key)
        where = f"{folder / WEIGHTS}: {key}"
        name = _weight_name(found[1] + ".weight" if found else key, weights, where)
        if found:
            pairs.setdefault(name, {})[found[2]] = tensor
        elif tensor.shape != weights[name].shape:
            raise BadCheckpointError(f"{where} has shape {tuple(tensor.shape)}; expected {tuple(weights[name].shape)}")
        else:
            whole[name] = tensor
    if not pairs and not whole:
        raise BadCheckpointError(f"{folder / WEIGHTS} holds no tensors")
    return Adapter({name: _factors(name, pair, weights[name], config) for name, pair in pairs.items()}, whole)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        require_regular(path)
        tensors = load_file(path)
    except FileNotFoundError as error:
        raise BadCheckpointError(f"{path} is missing: expected a folder as peft's save_pretrained writes it") from error
    except (OSError, SafetensorError) as error:
        raise BadCheckpointError(f"{path} cannot be read: {why(error)}") from error
    for key, tensor in tensors.items():
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise BadCheckpointError(f"{path}: {key} holds no finite floating-point numbers")
    return {key: tensor.float() for key, tensor in tensors.items()}


def _weight_name(key: str, weights: Mapping[str, Tensor], where: str) -> str:
    """The model's own name of the weight that a key of the file means."""
    bare = key.removeprefix(PREFIX)
    for spelling, part in _SPELLINGS:
        name = part + bare.removeprefix(spelling)
        if bare.startswith(spelling) and name in weights:
            return name
    raise BadCheckpointError(f"{where}: this model has no weight {bare}; the adapter belongs to another model")


def _factors(name: str, pair: Mapping[str, Tensor], weight: Tensor, config: Keys) -> Factors:
    if set(pair) != {"A", "B"}:
        raise BadCheckpointError(f"{config.where}: {name} has lora_{next(iter(pair))} alone; expected lora_A, lora_B")
    a, b = pair["A"], pair["B"]
    module = name.removesuffix(".weight")
    rank = _of_module(config, "rank_pattern", module, config["r"])
    if type(rank) is not int or rank < 1:
        raise config.bad("r", "a whole number of at least 1")
    if weight.ndim != 2 or a.shape != (rank, weight.shape[1]) or b.shape != (weight.shape[0], rank):
        raise BadCheckpointError(
            f"{config.where}: {module} of shape {tuple(weight.shape)} with rank {rank} needs lora_A "
            f"({rank}, in) and lora_B (out, {rank}); found {tuple(a.shape)} and {tuple(b.shape)}"
        )
    try:
        alpha = _ALPHA(_of_module(config, "alpha_pattern", module, config["lora_alpha"]))
    except ValueError as error:
        raise config.bad("lora_alpha", str(error)) from None
    return Factors(a, b, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _repeats(pattern: str) -> int:
    return pattern.count("*") + pattern.count("+")


def _of_module(config: Keys, key: str, module: str, default: Any) -> Any:
    """A module's own rank or alpha: peft takes the first pattern that matches the end of its name."""
    for pattern, value in config.part(key).data.items():
        if len(pattern) > 500 or not _PATTERN.fullmatch(pattern) or _repeats(pattern) > 2 or pattern.count("|") > 10:
            raise config.bad(key, "names of modules, with at most two .* or \\d+ and ten | in each")
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as error:
            raise config.bad(key, f"regular expressions, {shown(pattern)} is none: {error}") from error
    return default
