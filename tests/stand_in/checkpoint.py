"""A checkpoint folder of the published sizes: its JSON files and tensor headers are true, its tensors are holes.

25 GB by name, a few MB on disk. Data is never read: `reader` stands for `safetensors.safe_open`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from mindomni_rt.checkpoint.config import ModelConfig, published
from mindomni_rt.checkpoint.dump import config_files

SMALL = Path(__file__).parents[2] / "assets" / "shapes-world"  # its tokenizer is short and knows VAE features
CONFIGURATIONS = ("config.json", "generation_config.json", "preprocessor_config.json")


def sizes(edit_features: str = "vit") -> ModelConfig:
    """The published sizes with the special tokens of the small tokenizer in assets/."""
    config = published()
    small = json.loads((SMALL / "mllm" / "config.json").read_text(encoding="utf-8"))
    generation = json.loads((SMALL / "mllm" / "generation_config.json").read_text(encoding="utf-8"))
    ids = {name: small[name] for name in ("image_token_id", "vision_start_token_id", "vision_end_token_id")}
    return replace(
        config,
        language=replace(config.language, **ids),
        generation=replace(config.generation, eos_token_ids=tuple(generation["eos_token_id"])),
        edit_features=edit_features,
    )


def write(folder: Path, config: ModelConfig, dtype: str = "BF16") -> Path:
    """The folder, with the small tokenizer."""
    import torch

    from mindomni_rt.model.mindomni import MindOmniModel

    for name, data in config_files(config).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data), encoding="utf-8")
    for path in (SMALL / "mllm").iterdir():
        if path.suffix in (".json", ".jinja") and path.name not in CONFIGURATIONS:
            shutil.copyfile(path, folder / "mllm" / path.name)
    with torch.device("meta"):
        model = MindOmniModel(config)
    mllm = {f"visual.{n}": t for n, t in model.vision.state_dict().items()}
    mllm |= {n if n == "lm_head.weight" else f"model.{n}": t for n, t in model.language.state_dict().items()}
    _file(folder / "mllm" / "model.safetensors", mllm, dtype)
    _file(folder / "image_decoder" / "model.safetensors", model.decoder.state_dict(), dtype)
    _file(folder / "connector.safetensors", model.connector.state_dict(), dtype)
    _file(folder / "vae" / "diffusion_pytorch_model.safetensors", model.vae.state_dict(), dtype)
    return folder


def _file(path: Path, state: Mapping[str, Any], dtype: str) -> None:
    header, at = dict[str, Any](), 0
    for name, tensor in state.items():
        size = tensor.numel() * 2
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)


class _Reader:
    def __init__(self, path: Any) -> None:
        with Path(path).open("rb") as file:
            self._header = json.loads(file.read(int.from_bytes(file.read(8), "little")))

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def keys(self) -> list[str]:
        return [name for name in self._header if name != "__metadata__"]

    def get_tensor(self, name: str) -> Any:
        import torch

        return torch.empty(self._header[name]["shape"], dtype=torch.bfloat16)


@contextmanager
def reader() -> Iterator[None]:
    """Tensors without data instead of the holes."""
    import safetensors

    real = safetensors.safe_open

    def open_it(path: Any, framework: str, **options: Any) -> Any:
        return _Reader(path) if framework == "pt" else real(path, framework, **options)

    safetensors.safe_open = open_it  # type: ignore[misc,assignment]
    try:
        yield
    finally:
        safetensors.safe_open = real  # type: ignore[misc]
