"""`ModelConfig` → the JSON files of the published layout, and which tensors go into which shard."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from .config import ModelConfig, RopeConfig

OWN = "mindomni.json"  # what this program knows of a checkpoint and the published files do not say
SHARD_BYTES = 5 * 10**9  # as transformers shards


def plan_shards(sizes: Mapping[str, int], stem: str) -> dict[str, list[str]]:
    """File name → tensors, in order, each file at most SHARD_BYTES unless one tensor alone is larger."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, count in sizes.items():
        if size + count > SHARD_BYTES and shards[-1]:
            shards.append([])
            size = 0
        size += count
        shards[-1].append(name)
    if len(shards) == 1:
        return {f"{stem}.safetensors": shards[0]}
    return {f"{stem}-{n:05d}-of-{len(shards):05d}.safetensors": names for n, names in enumerate(shards, 1)}


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
    files[OWN] = {"edit_features": config.edit_features, "recommended": asdict(config.recommended)}
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
