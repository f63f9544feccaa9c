"""A trained adapter as a folder that peft and `Pipeline.load_adapter` read, beside the merged model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mindomni_rt.backends.torch.adapters import CONFIG, PREFIX, WEIGHTS
from mindomni_rt.outputs import write_json

from .outputs import save_tensors
from .stages.adapters import adapter_layers
from .stages.base import Stage


def save_adapter(stage: Stage, trained: Mapping[str, Tensor], folder: Path, base: str) -> bool:
    """Writes the LoRA factors and the parts that were trained whole; nothing, and False, without adapters.

    trained: all trained parameters by name. base: the checkpoint that the adapter belongs to.
    """
    layers = adapter_layers(stage.model)
    if not layers:
        return False
    tensors: dict[str, Tensor] = {}
    first: Any = layers[0][1]
    for name, layer in layers:
        tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_A["default"].weight
        tensors[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_B["default"].weight
    whole = {name: tensor for name, tensor in trained.items() if ".lora_" not in name}
    tensors |= {f"{PREFIX}{name}": tensor for name, tensor in whole.items()}
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "r": first.r["default"],
        "lora_alpha": first.lora_alpha["default"],
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
        "target_modules": [name for name, _ in layers],
        "modules_to_save": sorted({name.rpartition(".")[0] for name in whole}) or None,
    }
    save_tensors(folder / WEIGHTS, {name: tensor.detach().cpu().float() for name, tensor in tensors.items()})
    write_json(folder / CONFIG, config)
    return True
