"""The published checkpoint layout: where it is, what its JSON files say, which tensors lie in which file.

    mllm/            config.json, generation_config.json, model*.safetensors, tokenizer and preprocessor files
    image_decoder/   config.json (a Phi3Config), model.safetensors or model.pt
    connector.safetensors
    vae/             config.json, diffusion_pytorch_model.safetensors

Nothing here imports torch; tensors become modules in `model/mindomni.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import BadCheckpointError, MissingExtraError
from .config import (
    ConnectorConfig,
    DecoderConfig,
    GenerationConfig,
    ImageConfig,
    LanguageConfig,
    ModelConfig,
    RopeConfig,
    StackConfig,
    VAEConfig,
    VisionConfig,
)

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
# Buffers that some versions store and every version can compute.
_COMPUTED = re.compile(r"(^|\.)(rotary_emb|rotary_pos_emb)\.(inv_freq|cos_cached|sin_cached)$|^pos_embed$")
# VAE files written before diffusers 0.18 name the attention projections so.
_VAE_LEGACY = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


@dataclass(frozen=True)
class TensorEntry:
    """One stored tensor: file, its name there, dtype as safetensors spells it ("BF16"), shape."""

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]


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


def resolve(
    path_or_repo_id: str | Path,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Path:
    """The local folder of a checkpoint or bundle; a hub id ("owner/name") is downloaded into huggingface_hub's cache.

    Honours HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE and HF_TOKEN. Raises BadCheckpointError.
    """
    path = Path(path_or_repo_id).expanduser()
    if path.is_dir():
        return path
    text = str(path_or_repo_id)
    if path.exists():
        raise BadCheckpointError(f"{text} is a file; expected a checkpoint or bundle folder, or a hub id")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", text) or text.startswith((".", "/")):
        raise BadCheckpointError(f"no folder at {text}, and it is not a hub id of the form owner/name")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise MissingExtraError("huggingface_hub", "torch") from error
    try:
        return Path(snapshot_download(text, revision=revision, token=token, local_files_only=local_files_only))
    except Exception as error:  # the hub raises a family of its own plus its HTTP library's; all mean "not available"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BadCheckpointError(f"no folder at {text}, and the hub did not provide it: {reason}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or BadCheckpointError naming the file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadCheckpointError(f"{path} is missing") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadCheckpointError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(data, dict):
        raise BadCheckpointError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data


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

    for entry in _index(path / "mllm", "model"):
        for old, new in _MLLM_PREFIXES:
            if entry.key.startswith(old):
                part, name = (new + entry.key.removeprefix(old)).split(".", 1)
                take(part, name, entry)
                break
        else:
            unused.append(entry.key)
    for entry in _index(path / "image_decoder", "model"):
        take("decoder", entry.key, entry)
    for entry in _headers(path / "connector.safetensors"):
        take("connector", entry.key, entry)
    for entry in _index(path / "vae", "diffusion_pytorch_model"):
        take("vae", _vae_name(entry.key), entry)
    try:
        config = _read_config(path, tensors)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise BadCheckpointError(f"{path}: a configuration file lacks or misspells {error}") from error
    return Checkpoint(path, config, tensors, tuple(computed), tuple(unused))


def _vae_name(key: str) -> str:
    if ".attentions." in key:
        for old, new in _VAE_LEGACY.items():
            key = key.replace(old, new)
    return key


def _index(folder: Path, stem: str) -> list[TensorEntry]:
    """Entries of a sharded or single file; the index, when there is one, must agree with its shards."""
    index = folder / f"{stem}.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise BadCheckpointError(f"{index}: expected a weight_map of tensor names to files")
        if any("/" in name or "\\" in name for name in weight_map.values()):
            raise BadCheckpointError(f"{index}: shard names must be plain file names")
        entries = [e for name in sorted(set(weight_map.values())) for e in _headers(folder / name)]
        missing = sorted(set(weight_map) - {e.key for e in entries})
        if missing:
            raise BadCheckpointError(
                f"{index} promises tensor {missing[0]} in {weight_map[missing[0]]}; it is not there"
            )
        return entries
    single = folder / f"{stem}.safetensors"
    if single.exists():
        return _headers(single)
    if (folder / "model.pt").exists():
        return _pickled(folder / "model.pt")
    raise BadCheckpointError(f"{folder}: expected {stem}.safetensors or {stem}.safetensors.index.json with its shards")


def _headers(path: Path) -> list[TensorEntry]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise MissingExtraError("safetensors", "torch") from error
    if not path.is_file():
        raise BadCheckpointError(f"{path} is missing")
    try:
        with safe_open(path, framework="np") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 safe_open is no dict
            return [TensorEntry(path, k, s.get_dtype(), tuple(s.get_shape())) for k, s in slices.items()]
    except (SafetensorError, OSError) as error:
        raise BadCheckpointError(
            f"{path} is not a whole safetensors file ({error}); {path.stat().st_size} bytes found: download it again"
        ) from error


def _pickled(path: Path) -> list[TensorEntry]:
    """OmniGen's older model.pt, read without executing anything it holds."""
    from ..model.pickled import read_pickled

    names = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
    state = read_pickled(path)
    return [
        TensorEntry(path, k, names.get(str(t.dtype).removeprefix("torch."), str(t.dtype)), tuple(t.shape))
        for k, t in state.items()
    ]


def _read_config(path: Path, tensors: Mapping[str, Mapping[str, TensorEntry]]) -> ModelConfig:
    mllm = read_json(path / "mllm" / "config.json")
    text = {**mllm, **mllm.get("text_config", {})}
    generation = _optional_json(path / "mllm" / "generation_config.json")
    eos = generation.get("eos_token_id", text.get("eos_token_id"))
    if eos is None:
        raise BadCheckpointError(f"{path}/mllm: neither generation_config.json nor config.json gives eos_token_id")
    decoder = _decoder_config(read_json(path / "image_decoder" / "config.json"), tensors["decoder"], path)
    return ModelConfig(
        vision=_vision_config(mllm["vision_config"]),
        language=LanguageConfig(
            stack=StackConfig(
                hidden_size=text["hidden_size"],
                num_layers=text["num_hidden_layers"],
                num_heads=text["num_attention_heads"],
                num_kv_heads=text["num_key_value_heads"],
                intermediate_size=text["intermediate_size"],
                rms_norm_eps=text["rms_norm_eps"],
                qkv_bias=True,
                rope=_rope(text, "mrope"),
            ),
            vocab_size=text["vocab_size"],
            max_positions=text["max_position_embeddings"],
            image_token_id=mllm["image_token_id"],
            vision_start_token_id=mllm["vision_start_token_id"],
            vision_end_token_id=mllm["vision_end_token_id"],
            tie_embeddings=bool(mllm.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        ),
        connector=_connector_config(decoder, tensors["connector"], path),
        decoder=decoder,
        vae=_vae_config(read_json(path / "vae" / "config.json"), path),
        image=_image_config(_optional_json(path / "mllm" / "preprocessor_config.json")),
        generation=GenerationConfig(
            eos_token_ids=tuple(eos) if isinstance(eos, list) else (eos,),
            repetition_penalty=float(generation.get("repetition_penalty") or 1.0),
        ),
        edit_features=_optional_json(path / "mindomni.json").get("edit_features", "vit"),
    )


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _rope(config: Mapping[str, Any], default: str) -> RopeConfig:
    """rope_scaling or transformers 5's rope_parameters; `type` or `rope_type`; `su` or `longrope`."""
    scaling = {**(config.get("rope_parameters") or {}), **(config.get("rope_scaling") or {})}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if scaling.get("mrope_section"):
        kind = "mrope"
    kind = {"su": "longrope", "default": "plain"}.get(kind, kind)
    if kind not in ("plain", "mrope", "longrope") or (default == "mrope" and kind != "mrope"):
        raise BadCheckpointError(
            f"rope type {kind!r} is not supported here; expected {default} (su and longrope agree)"
        )
    maximum = int(config["max_position_embeddings"])
    original = config.get("original_max_position_embeddings") or scaling.get("original_max_position_embeddings")
    factors = {name: tuple(map(float, scaling.get(name, ()))) for name in ("short_factor", "long_factor")}
    if kind == "longrope":
        half = config["hidden_size"] // config["num_attention_heads"] // 2
        for name, values in factors.items():
            if len(values) != half:
                raise BadCheckpointError(f"{name} has {len(values)} entries; expected head_dim / 2 = {half}")
    return RopeConfig(
        kind=kind,
        theta=float(config.get("rope_theta") or scaling.get("rope_theta") or 10000.0),
        mrope_section=tuple(scaling.get("mrope_section", ())),
        original_max_positions=int(original or maximum),
        max_positions=maximum,
        **factors,
    )


def _vision_config(config: Mapping[str, Any]) -> VisionConfig:
    return VisionConfig(
        hidden_size=config["hidden_size"],
        num_layers=config["depth"],
        num_heads=config["num_heads"],
        intermediate_size=config["intermediate_size"],
        out_hidden_size=config["out_hidden_size"],
        patch_size=config["patch_size"],
        temporal_patch_size=config.get("temporal_patch_size", 2),
        merge_size=config["spatial_merge_size"],
        window_size=config["window_size"],
        full_attention_layers=tuple(config["fullatt_block_indexes"]),
        in_channels=config.get("in_channels", config.get("in_chans", 3)),
    )


def _decoder_config(config: Mapping[str, Any], tensors: Mapping[str, TensorEntry], path: Path) -> DecoderConfig:
    if config.get("partial_rotary_factor", 1.0) != 1.0:
        raise BadCheckpointError(
            f"{path}/image_decoder/config.json: partial_rotary_factor other than 1 is not supported"
        )
    patch = _shape(tensors, "x_embedder.proj.weight", path / "image_decoder")
    text = tensors.get("llm.embed_tokens.weight")
    return DecoderConfig(
        stack=StackConfig(
            hidden_size=config["hidden_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=config["num_attention_heads"],
            num_kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
            intermediate_size=config["intermediate_size"],
            rms_norm_eps=config["rms_norm_eps"],
            rope=_rope(config, "longrope"),
            fused=True,
        ),
        latent_channels=patch[1],
        patch_size=patch[2],
        time_frequencies=_shape(tensors, "t_embedder.mlp.0.weight", path / "image_decoder")[1],
        text_vocab_size=text.shape[0] if text else 0,
    )


def _connector_config(decoder: DecoderConfig, tensors: Mapping[str, TensorEntry], path: Path) -> ConnectorConfig:
    """The file itself says how wide its input is and how many layers it has; the rest is the decoder's."""
    layers = {int(name.split(".")[0]) for name in tensors if name.split(".")[0].isdigit()} - {0}
    if layers != set(range(1, len(layers) + 1)):
        raise BadCheckpointError(
            f"{path}/connector.safetensors: layers {sorted(layers)}; expected 1, 2, … without gaps"
        )
    return ConnectorConfig(
        input_size=_shape(tensors, "0.weight", path / "connector.safetensors")[1],
        stack=replace(decoder.stack, num_layers=len(layers)),
    )


def _shape(tensors: Mapping[str, TensorEntry], name: str, where: Path) -> tuple[int, ...]:
    if name not in tensors:
        raise BadCheckpointError(f"{where}: tensor {name} is missing")
    return tensors[name].shape


def _vae_config(config: Mapping[str, Any], path: Path) -> VAEConfig:
    for key in ("use_quant_conv", "use_post_quant_conv", "mid_block_add_attention"):
        if config.get(key) is False:
            raise BadCheckpointError(f"{path}/vae/config.json: {key} = false is not SDXL's VAE and is not supported")
    return VAEConfig(
        block_out_channels=tuple(config["block_out_channels"]),
        layers_per_block=config["layers_per_block"],
        norm_num_groups=config["norm_num_groups"],
        in_channels=config.get("in_channels", 3),
        out_channels=config.get("out_channels", 3),
        latent_channels=config["latent_channels"],
        scaling_factor=config["scaling_factor"],
        shift_factor=config.get("shift_factor") or 0.0,
    )


def _image_config(config: Mapping[str, Any]) -> ImageConfig:
    defaults = ImageConfig()
    size = config.get("size") or {}
    return ImageConfig(
        min_pixels=config.get("min_pixels") or size.get("shortest_edge") or defaults.min_pixels,
        max_pixels=config.get("max_pixels") or size.get("longest_edge") or defaults.max_pixels,
        image_mean=tuple(config.get("image_mean", defaults.image_mean)),
        image_std=tuple(config.get("image_std", defaults.image_std)),
    )
