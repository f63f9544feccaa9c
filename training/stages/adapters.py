"""LoRA through peft: added, switched off for a reference, merged back into plain weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from mindomni_rt.errors import BadRequestError, MissingExtraError

from ..config import AdapterConfig


def adapter_layers(module: nn.Module) -> list[tuple[str, Any]]:
    """Adapter layers below a module; none, and no import of peft, where there are none."""
    return [(n, m) for n, m in module.named_modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")]


def add_adapters(module: nn.Module, config: AdapterConfig, rank: int, targets: tuple[str, ...], seed: int) -> None:
    """Adapters on every Linear below `module` whose last name is in targets. The output does not change yet."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise MissingExtraError("peft", "train") from error
    wanted = config.targets or targets
    names = [n for n, m in module.named_modules() if isinstance(m, nn.Linear) and n.rsplit(".", 1)[-1] in wanted]
    if not names:
        raise BadRequestError(
            f"lora.targets = {list(wanted)}: no Linear layer has that name; expected some of {_linear_names(module)}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lora = LoraConfig(
            r=rank,
            lora_alpha=config.alpha or rank,  # type: ignore[arg-type]  # peft only divides it by the rank
            lora_dropout=config.dropout,
            target_modules=names,
            init_lora_weights="gaussian" if config.init == "gaussian" else True,
        )
        inject_adapter_in_model(lora, module)


def _linear_names(module: nn.Module) -> list[str]:
    return sorted({n.rsplit(".", 1)[-1] for n, m in module.named_modules() if isinstance(m, nn.Linear)})


@contextmanager
def adapters_off(module: nn.Module) -> Iterator[None]:
    """The module as it was before its adapters: the reference policy, or the teacher."""
    layers = [m for _, m in adapter_layers(module)]
    before = [m._disable_adapters for m in layers]
    for layer in layers:
        layer._disable_adapters = True  # peft's own switch without its change of requires_grad
    try:
        yield
    finally:
        for layer, state in zip(layers, before, strict=True):
            layer._disable_adapters = state


def merge_adapters(module: nn.Module) -> None:
    """Adds every adapter to its Linear layer and removes it, which restores the published names.

    The sum is computed in float32 and rounded once to the type of the weight.
    """
    for name, layer in adapter_layers(module):
        parent, _, last = name.rpartition(".")
        owner = module.get_submodule(parent)
        base = layer.get_base_layer().requires_grad_(False)
        total = base.weight.float()
        for adapter in layer.active_adapters:
            factors = layer.lora_B[adapter].weight.float() @ layer.lora_A[adapter].weight.float()
            total = total + layer.scaling[adapter] * factors
        base.weight.data = total.to(base.weight.dtype)
        setattr(owner, last, base)
