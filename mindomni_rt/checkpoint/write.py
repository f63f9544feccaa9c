"""Writes a model back in the published layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import ModelConfig, RopeConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..model.mindomni import MindOmniModel

SHARD_BYTES = 5 * 10**9  # as transformers shards


def save_model(model: MindOmniModel, folder: Path, source: Path | None = None) -> None:
    """Writes `folder` in the published layout; the tensors keep their dtype, so load and save is bit-exact.

    source: a checkpoint whose tokenizer, template and preprocessor files are copied (and whose JSON configurations
    are kept as they are); without one the configurations are written from `model.config` and the caller adds the
    tokenizer. Files are written beside their names and renamed, so a name never holds half a file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if source is not None:
        _copy_files(source, folder)
    else:
        for name, data in config_files(model.config).items():
            _write_json(folder / name, data)
    mllm = {f"visual.{n}": t for n, t in model.vision.state_dict().items()}
    for name, tensor in model.language.state_dict().items():
        if name != "lm_head.weight":
            mllm[f"model.{name}"] = tensor
        elif not model.config.language.tie_embeddings:
            mllm[name] = tensor
    _save_shards(mllm, folder / "mllm", "model")
    _save_shards(_state(model.decoder), folder / "image_decoder", "model")
    _save_file(_state(model.connector), folder / "connector.safetensors")
    _save_shards(_state(model.vae), folder / "vae", "diffusion_pytorch_model")


def _state(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.state_dict())


def _copy_files(source: Path, folder: Path) -> None:
    for path in source.rglob("*"):
        # A hub cache holds links; copy what they point to, and none of the weights.
        if path.is_file() and path.suffix in (".json", ".txt", ".jinja", ".model") and ".index." not in path.name:
            target = folder / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.resolve() != path.resolve():
                shutil.copyfile(path, target)


def _save_shards(state: dict[str, Tensor], folder: Path, stem: str) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in state.items():
        size += tensor.numel() * tensor.element_size()
        if size > SHARD_BYTES and shards[-1]:
            shards.append({})
            size = tensor.numel() * tensor.element_size()
        shards[-1][name] = tensor
    folder.mkdir(parents=True, exist_ok=True)
    if len(shards) == 1:
        _save_file(state, folder / f"{stem}.safetensors")
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        _save_file(shard, folder / name)
        weight_map.update(dict.fromkeys(shard, name))
    total = sum(t.numel() * t.element_size() for t in state.values())
    _write_json(
        folder / f"{stem}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
    )


def _save_file(state: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    temporary = path.with_name(f".{path.name}.partial")
    try:
        save_file({n: t.detach().cpu().contiguous() for n, t in state.items()}, temporary, metadata={"format": "pt"})
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def config_files(config: ModelConfig) -> dict[str, dict[str, Any]]:
    """The JSON files of the published layout for a configuration, by path inside the checkpoint."""
    vision, language, decoder, vae = config.vision, config.language, config.decoder, config.vae
    files: dict[str, dict[str, Any]] = {
        "mllm/config.json": {
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "model_type": "qwen2_5_vl",
            **_stack(language.stack),
            "hidden_act": "silu",
            "vocab_size": language.vocab_size,
            "max_position_embeddings": language.max_positions,
            "rope_theta": language.stack.rope.theta,
            "rope_scaling": {"type": "default", "mrope_section": list(language.stack.rope.mrope_section)},
            "tie_word_embeddings": language.tie_embeddings,
            "image_token_id": language.image_token_id,
            "vision_start_token_id": language.vision_start_token_id,
            "vision_end_token_id": language.vision_end_token_id,
            "eos_token_id": config.generation.eos_token_ids[0],
            "vision_config": {
                "model_type": "qwen2_5_vl",
                "depth": vision.num_layers,
                "hidden_size": vision.hidden_size,
                "num_heads": vision.num_heads,
                "intermediate_size": vision.intermediate_size,
                "out_hidden_size": vision.out_hidden_size,
                "patch_size": vision.patch_size,
                "temporal_patch_size": vision.temporal_patch_size,
                "spatial_merge_size": vision.merge_size,
                "window_size": vision.window_size,
                "fullatt_block_indexes": list(vision.full_attention_layers),
                "in_channels": vision.in_channels,
                "hidden_act": "silu",
            },
        },
        "mllm/generation_config.json": {
            "eos_token_id": list(config.generation.eos_token_ids),
            "repetition_penalty": config.generation.repetition_penalty,
        },
        "mllm/preprocessor_config.json": {
            "image_processor_type": "Qwen2VLImageProcessor",
            "min_pixels": config.image.min_pixels,
            "max_pixels": config.image.max_pixels,
            "image_mean": list(config.image.image_mean),
            "image_std": list(config.image.image_std),
            "patch_size": vision.patch_size,
            "temporal_patch_size": vision.temporal_patch_size,
            "merge_size": vision.merge_size,
        },
        "image_decoder/config.json": {
            "model_type": "phi3",
            **_stack(decoder.stack),
            "hidden_act": "silu",
            "vocab_size": decoder.text_vocab_size or 32064,
            "rope_theta": decoder.stack.rope.theta,
            "max_position_embeddings": decoder.stack.rope.max_positions,
            "original_max_position_embeddings": decoder.stack.rope.original_max_positions,
            "rope_scaling": _longrope(decoder.stack.rope),
            "tie_word_embeddings": False,
        },
        "vae/config.json": {
            "_class_name": "AutoencoderKL",
            "act_fn": "silu",
            "block_out_channels": list(vae.block_out_channels),
            "down_block_types": ["DownEncoderBlock2D"] * len(vae.block_out_channels),
            "up_block_types": ["UpDecoderBlock2D"] * len(vae.block_out_channels),
            "layers_per_block": vae.layers_per_block,
            "norm_num_groups": vae.norm_num_groups,
            "in_channels": vae.in_channels,
            "out_channels": vae.out_channels,
            "latent_channels": vae.latent_channels,
            "scaling_factor": vae.scaling_factor,
            "shift_factor": vae.shift_factor or None,
        },
    }
    if config.edit_features != "vit":
        files["mindomni.json"] = {"edit_features": config.edit_features}
    return files


def _stack(stack: Any) -> dict[str, Any]:
    return {
        "hidden_size": stack.hidden_size,
        "num_hidden_layers": stack.num_layers,
        "num_attention_heads": stack.num_heads,
        "num_key_value_heads": stack.num_kv_heads,
        "intermediate_size": stack.intermediate_size,
        "rms_norm_eps": stack.rms_norm_eps,
    }


def _longrope(rope: RopeConfig) -> dict[str, Any] | None:
    if rope.kind != "longrope":
        return None
    return {"type": "longrope", "short_factor": list(rope.short_factor), "long_factor": list(rope.long_factor)}
