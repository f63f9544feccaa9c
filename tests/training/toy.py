"""A toy model and records for tests of training: everything real, only tiny."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mindomni_rt.checkpoint.config import VAEConfig
from mindomni_rt.inputs.prompts import Chat
from mindomni_rt.model.mindomni import MindOmniModel, load_model
from mindomni_rt.training.config import Config, build
from mindomni_rt.training.fresh import write_fresh
from mindomni_rt.training.stages.contexts import Contexts

WORDS = [
    "draw",
    "one",
    "two",
    "three",
    "red",
    "blue",
    "circle",
    "square",
    "the",
    "same",
    "how",
    "many",
    "picture",
    "a",
    "is",
]
VAE = VAEConfig(block_out_channels=(4, 4, 8, 8), layers_per_block=1, norm_num_groups=2)


@dataclass(frozen=True)
class ToyRecord:
    instruction: str
    think_content: str = ""
    answer: str = ""
    input_images: tuple[Any, ...] = ()
    output_image: Any = None
    gt_prompt: str = ""
    reply: str = ""
    edit_features: str = ""
    source: str = "toy"


def picture(seed: int, size: int = 32) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (size, size, 3), dtype=np.uint8))


def record(index: int) -> ToyRecord:
    rng = np.random.default_rng(index)
    count, colour, shape = rng.choice(["one", "two"]), rng.choice(["red", "blue"]), rng.choice(["circle", "square"])
    caption = f"{count} {colour} {shape}"
    kind = index % 4
    if kind == 3:
        return ToyRecord("how many", reply=str(count), input_images=(picture(index),), source=f"toy:{index}")
    return ToyRecord(
        f"draw {caption}" if kind != 2 else "the same",
        think_content=f"a {colour} is {count}" if kind == 1 else "",
        answer=caption if kind == 1 else "",
        input_images=(picture(index + 1),) if kind == 2 else (),
        output_image=picture(index),
        gt_prompt=caption,
        source=f"toy:{index}",
    )


@dataclass
class ToyStream:
    """Records in order; `only` keeps those of some kinds."""

    kinds: tuple[int, ...] = (0, 1, 2, 3)
    at: int = 0
    poison: int = -1
    taken: list[int] = field(default_factory=list)

    def next_batch(self, count: int) -> list[ToyRecord]:
        out = []
        while len(out) < count:
            if self.at % 4 in self.kinds:
                out.append(record(self.at))
                self.taken.append(self.at)
            self.at += 1
        return out

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


def toy_folder(folder: Path) -> Path:
    if not (folder / "connector.safetensors").exists():
        write_fresh(folder, WORDS, VAE, width=32)
    return folder


def toy_config(stage: str, folder: Path, out: Path, **tables: Any) -> Config:
    data: dict[str, Any] = {
        "stage": stage, "model": str(folder), "out": str(out), "device": "cpu", "precision": "fp32",
        **{k: v for k, v in tables.items() if not isinstance(v, dict)},
    }  # fmt: skip
    defaults = {
        "data": {"image_size": 32, "drop": 0.0},
        "optim": {"steps": 4, "batch": 4, "lr": 1e-3},
        "rgpo": {"max_new_tokens": 6, "image_steps": 3, "guidance": 1.0, "group": 2, "dump_every": 0},
    }
    for name in ("data", "optim", "rgpo", "lora", "distill", "prior", "sft"):
        data[name] = {**defaults.get(name, {}), **tables.get(name, {})}
    config = build(Config, data, "toy")
    assert isinstance(config, Config)
    return config


def toy_contexts(folder: Path, size: int = 32, noisy: bool = True) -> Contexts:
    model, _ = load_model(folder, torch.float32)
    if noisy:  # a decoder whose last layer is zero would hide what lies before it
        torch.manual_seed(1)
        torch.nn.init.normal_(model.decoder.final_layer.linear.weight, std=0.1)
        torch.nn.init.normal_(model.decoder.final_layer.adaLN_modulation[1].weight, std=0.1)
    assert isinstance(model, MindOmniModel)
    return Contexts(model, Chat(folder / "mllm"), size)
