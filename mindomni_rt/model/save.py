"""Writes a model in the published layout."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..checkpoint.dump import OWN, config_files, plan_shards
from ..checkpoint.parse import own_config
from ..errors import BadCheckpointError
from ..files import replace_file, write_text
from .mindomni import MindOmniModel

_RECORD = "evaluation.json"  # of a packed model: what its weights were measured at says nothing about others


def save_model(model: MindOmniModel, folder: Path, source: Path | None = None) -> None:
    """Writes `folder` in the published layout; the tensors keep their dtype, so load and save is bit-exact.

    source: a checkpoint whose tokenizer, template and preprocessor files are copied (and whose JSON configurations
    are kept as they are, but for settings of mindomni.json that changed since); without one the configurations are
    written from `model.config` and the caller adds the
    tokenizer. Files are written beside their names and renamed, so a name never holds half a file; shards and an
    index that an earlier save left are removed. Raises BadCheckpointError if a file cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if source is not None:
            _copy_files(source, folder)
            own = {name: getattr(model.config, name) for name in ("edit_features", "recommended")}
            if own_config(source / OWN) != own:
                _write_json(folder / OWN, config_files(model.config)[OWN])
        else:
            for name, data in config_files(model.config).items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                _write_json(folder / name, data)
        _save_shards(_mllm(model), folder / "mllm", "model")
        _save_shards(_state(model.decoder), folder / "image_decoder", "model")
        _save_file(_state(model.connector), folder / "connector.safetensors")
        _save_shards(_state(model.vae), folder / "vae", "diffusion_pytorch_model")
    except OSError as error:
        raise BadCheckpointError(f"cannot write the checkpoint {folder}: {error.strerror or error}") from error


def _mllm(model: MindOmniModel) -> dict[str, Tensor]:
    state = {f"visual.{n}": t for n, t in model.vision.state_dict().items()}
    for name, tensor in model.language.state_dict().items():
        if name != "lm_head.weight":
            state[f"model.{name}"] = tensor
        elif not model.config.language.tie_embeddings:
            state[name] = tensor
    return state


def _state(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.state_dict())


def _copy_files(source: Path, folder: Path) -> None:
    for path in source.rglob("*"):
        # A hub cache holds links; copy what they point to, and none of the weights.
        if path.name == _RECORD:
            continue
        if path.is_file() and path.suffix in (".json", ".txt", ".jinja", ".model") and ".index." not in path.name:
            target = folder / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.resolve() != path.resolve():
                shutil.copyfile(path, target)


def _save_shards(state: dict[str, Tensor], folder: Path, stem: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {name: t.numel() * t.element_size() for name, t in state.items()}
    files = plan_shards(sizes, stem)
    for file, names in files.items():
        _save_file({n: state[n] for n in names}, folder / file)
    index = folder / f"{stem}.safetensors.index.json"
    if len(files) > 1:
        weight_map = {name: file for file, names in files.items() for name in names}
        _write_json(index, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})
    else:
        index.unlink(missing_ok=True)
    stale = re.compile(re.escape(stem) + r"(-\d{5}-of-\d{5})?\.safetensors|model\.pt")
    for path in list(folder.iterdir()):
        if stale.fullmatch(path.name) and path.name not in files:
            path.unlink()


def _save_file(state: dict[str, Tensor], path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {n: t.detach().cpu().contiguous() for n, t in state.items()}
    try:
        replace_file(path, lambda temporary: save_file(tensors, temporary, metadata={"format": "pt"}))
    except SafetensorError as error:  # how safetensors spells a full disk
        raise BadCheckpointError(f"cannot write {path}: {error}") from error


def _write_json(path: Path, data: dict[str, Any]) -> None:
    write_text(path, json.dumps(data, indent=2) + "\n")
