"""The published checkpoint layout: which files it has, and how their tensors are named by part.

    mllm/            config.json, generation_config.json, model*.safetensors, tokenizer and preprocessor files
    image_decoder/   config.json (a Phi3Config), model.safetensors or model.pt
    connector.safetensors
    vae/             config.json, diffusion_pytorch_model.safetensors
    mindomni.json    edit_features ("vit" or "vit+vae") and recommended settings; absent from the released checkpoint

Nothing here imports torch; `model/weights.py` reads the tensors themselves.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import BadCheckpointError
from ..files import read_bytes, why
from .config import ModelConfig
from .headers import TensorEntry, read_headers, read_index
from .hub import resolve
from .json_files import MOST_BYTES
from .parse import read_config

__all__ = ["PARTS", "Checkpoint", "LoadReport", "TensorEntry", "open_checkpoint", "resolve"]

PARTS = ("vision", "language", "connector", "decoder", "vae")

# Older and newer transformers write the same tensors under these prefixes.
_MLLM_PREFIXES = (
    ("model.language_model.", "language."),
    ("language_model.model.", "language."),
    ("model.visual.", "vision."),
    ("visual.", "vision."),
    ("language_model.lm_head.", "language.lm_head."),
    ("lm_head.", "language.lm_head."),
    ("model.", "language."),
)
_LATENT_PAD = b'"<|latent_pad|>"'
# Buffers that some versions store and every version can compute.
_COMPUTED = re.compile(r"(^|\.)(rotary_emb|rotary_pos_emb)\.(inv_freq|cos_cached|sin_cached)$|^pos_embed$")
# VAE files written before diffusers 0.18 name the attention projections so.
_VAE_LEGACY = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


@dataclass
class LoadReport:
    """What a load did: per part the number of tensors and bytes read, what was computed, what was absent or unused."""

    path: str
    read: dict[str, int] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    computed: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"checkpoint {self.path}"]
        lines += [f"  {part}: {n} tensors, {self.bytes[part] / 2**20:.1f} MiB" for part, n in self.read.items()]
        for title, names in (("computed", self.computed), ("absent", self.absent), ("unused", self.unused)):
            if names:
                lines.append(f"  {title}: {', '.join(names[:8])}{' …' if len(names) > 8 else ''}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: its folder, configuration and tensor index by part and canonical name."""

    path: Path
    config: ModelConfig
    tensors: Mapping[str, Mapping[str, TensorEntry]]
    computed: tuple[str, ...]
    unused: tuple[str, ...]


def open_checkpoint(path: Path) -> Checkpoint:
    """Reads every configuration file and tensor header of a checkpoint folder; no tensor data yet."""
    tensors: dict[str, dict[str, TensorEntry]] = {part: {} for part in PARTS}
    computed: list[str] = []
    unused: list[str] = []

    def take(part: str, name: str, entry: TensorEntry) -> None:
        if _COMPUTED.search(name):
            computed.append(f"{part}.{name}")
        elif name in tensors[part]:
            raise BadCheckpointError(f"{entry.file}: tensor {entry.key} stands twice in the checkpoint")
        else:
            tensors[part][name] = entry

    for entry in read_index(path / "mllm", "model"):
        for old, new in _MLLM_PREFIXES:
            if entry.key.startswith(old):
                part, name = (new + entry.key.removeprefix(old)).split(".", 1)
                take(part, name, entry)
                break
        else:
            unused.append(entry.key)
    for entry in read_index(path / "image_decoder", "model"):
        take("decoder", entry.key, entry)
    for entry in read_headers(path / "connector.safetensors"):
        take("connector", entry.key, entry)
    for entry in read_index(path / "vae", "diffusion_pytorch_model"):
        take("vae", _vae_name(entry.key), entry)
    shapes = {part: {name: entry.shape for name, entry in found.items()} for part, found in tensors.items()}
    config = read_config(path, shapes)
    _check_edit_features(path)
    return Checkpoint(path, config, tensors, tuple(computed), tuple(unused))


def _vae_name(key: str) -> str:
    if ".attentions." in key:
        for old, new in _VAE_LEGACY.items():
            key = key.replace(old, new)
    return key


def _texts(path: Path) -> bytes:
    """A JSON file's bytes with ASCII letters unescaped; empty where it is absent."""
    try:
        return re.sub(rb"\\u00([0-7][0-9a-fA-F])", lambda m: bytes.fromhex(m[1].decode()), read_bytes(path, MOST_BYTES))
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise BadCheckpointError(f"{path}: {why(error)}") from error


def _check_edit_features(path: Path) -> None:
    """A checkpoint that was trained with VAE features must say so: without mindomni.json its edits would differ."""
    if (path / "mindomni.json").exists():
        return
    names = ("tokenizer.json", "tokenizer_config.json", "added_tokens.json", "vocab.json")
    if any(_LATENT_PAD in _texts(path / "mllm" / name) for name in names):
        raise BadCheckpointError(
            f"{path / 'mindomni.json'} is missing, though the tokenizer knows VAE features (<|latent_pad|>). Write "
            '{"edit_features": "vit+vae"} there if the checkpoint was trained with them, else {"edit_features": "vit"}'
        )
