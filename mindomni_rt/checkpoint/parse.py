"""The JSON files of a checkpoint → `ModelConfig`, read as transformers and diffusers read them.

A key whose value changes the arithmetic is either read or must have the one value that this program computes with;
the tables below name the second kind. Keys that neither library reads are ignored, as there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..checks import shown
from ..errors import BadCheckpointError
from .config import (
    EDIT_FEATURES,
    ConnectorConfig,
    DecoderConfig,
    GenerationConfig,
    ImageConfig,
    LanguageConfig,
    ModelConfig,
    StackConfig,
    VAEConfig,
    VisionConfig,
    recommended_config,
)
from .json_files import Keys, optional_json, read_json
from .rope import language_rope, phi3_rope

_SILU = ("silu", "swish")
_MLLM = {"model_type": ("qwen2_5_vl", "qwen2_5_vl_text")}
_TEXT = {
    "hidden_act": _SILU,
    "use_sliding_window": (False,),
    "attention_bias": (True,),  # transformers always has it; a checkpoint that denies it is another model
    "mlp_bias": (False,),
    "use_qk_norm": (False,),
}
_VISION = {"model_type": ("qwen2_5_vl", "qwen2_5_vl_vision"), "hidden_act": _SILU, "rms_norm_eps": (1e-6,)}
_PHI3 = {
    "model_type": ("phi3",),
    "hidden_act": _SILU,
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "lm_head_bias": (False,),
}
_VAE = {
    "_class_name": ("AutoencoderKL",),
    "act_fn": ("silu", "swish"),
    "use_quant_conv": (True,),
    "use_post_quant_conv": (True,),
    "mid_block_add_attention": (True,),
    "latents_mean": (),
    "latents_std": (),
}
_IMAGE = {
    "do_resize": (True,),
    "do_rescale": (True,),
    "rescale_factor": (1 / 255,),
    "do_normalize": (True,),
    "do_pad": (False,),
    "do_center_crop": (False,),
    "crop_size": (),
    "resample": (3,),
    "image_processor_type": (
        "Qwen2VLImageProcessor",
        "Qwen2VLImageProcessorFast",
        "Qwen2VLImageProcessorPil",
        "Qwen2_5_VLImageProcessor",
    ),
}
# Of generation_config.json the end tokens and the repetition penalty are read; whether and how to sample is the
# request's to say. These others would change greedy text.
_GENERATION: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "penalty_alpha": (0,),
    "dola_layers": (),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "diversity_penalty": (0,),
    "guidance_scale": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "bad_words_ids": ([],),
    "force_words_ids": ([],),
    "constraints": ([],),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "sequence_bias": ([], {}),
    "exponential_decay_length_penalty": (),
    "stop_strings": ([],),
    "watermarking_config": (),
    "token_healing": (False,),
}


def read_config(path: Path, shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> ModelConfig:
    """The configuration of the checkpoint folder `path`; shapes: of its tensors, by part and name.

    Raises BadCheckpointError naming the file and the key.
    """
    where = path / "mllm" / "config.json"
    mllm = Keys(read_json(where), str(where))
    mllm.require(_MLLM)
    vision = _vision(mllm.part("vision_config"))
    decoder = _decoder(path / "image_decoder", shapes["decoder"])
    text = mllm.part("text_config") if mllm.get("text_config") is not None else mllm
    config = ModelConfig(
        vision=vision,
        language=_language(mllm, text),
        connector=_connector(decoder, shapes["connector"], path),
        decoder=decoder,
        vae=_vae(path / "vae" / "config.json"),
        image=_image(path / "mllm", vision),
        generation=_generation(path / "mllm", text, mllm),
        **own_config(path / "mindomni.json"),
    )
    for token in config.generation.eos_token_ids:
        if token >= config.language.vocab_size:
            raise BadCheckpointError(
                f"{path}/mllm: eos_token_id {token} is outside of the vocabulary of {config.language.vocab_size} tokens"
            )
    return config


def _language(mllm: Keys, text: Keys) -> LanguageConfig:
    text.require(_TEXT)
    heads, hidden = text["num_attention_heads"], text["hidden_size"]
    layers = text["num_hidden_layers"]
    if any(kind != "full_attention" for kind in _list(text, "layer_types")):
        raise text.bad("layer_types", "full_attention in every layer; sliding windows are not supported")
    _same_head_dim(text, heads, hidden)
    tied = mllm.get("tie_word_embeddings", False) or text.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise mllm.bad("tie_word_embeddings", "true or false")
    return LanguageConfig(
        stack=StackConfig(
            hidden_size=hidden,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=text.get("num_key_value_heads", heads),
            intermediate_size=text["intermediate_size"],
            rms_norm_eps=text["rms_norm_eps"],
            qkv_bias=True,
            rope=language_rope(text),
        ),
        vocab_size=text["vocab_size"],
        max_positions=text["max_position_embeddings"],
        image_token_id=mllm["image_token_id"],
        vision_start_token_id=mllm["vision_start_token_id"],
        vision_end_token_id=mllm["vision_end_token_id"],
        tie_embeddings=tied,
    )


def _same_head_dim(config: Keys, heads: Any, hidden: Any) -> None:
    given = config.get("head_dim")
    if given is not None and (type(given), type(heads), type(hidden)) == (int,) * 3 and given * heads != hidden:
        raise config.bad("head_dim", f"hidden_size / num_attention_heads = {hidden}/{heads}")


def _vision(config: Keys) -> VisionConfig:
    config.require(_VISION)
    rope = config.part("rope_parameters")
    rope.require({"rope_type": ("default", "axial"), "rope_theta": (10000.0,)})
    blocks = _list(config, "fullatt_block_indexes", needed=True)
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
        full_attention_layers=tuple(blocks),
        in_channels=config.get("in_channels", config.get("in_chans", 3)),
    )


def _list(config: Keys, key: str, needed: bool = False) -> list[Any]:
    value = config[key] if needed else config.get(key, [])
    if not isinstance(value, list):
        raise config.bad(key, "a list")
    return value


def _decoder(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> DecoderConfig:
    path = folder / "config.json"
    config = Keys(read_json(path), str(path))
    config.require(_PHI3)
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    _same_head_dim(config, heads, hidden)
    window, maximum = config.get("sliding_window"), config["max_position_embeddings"]
    if window is not None and not (type(window) is type(maximum) is int and window >= maximum):
        raise config.bad(
            "sliding_window", "null or at least max_position_embeddings; sliding windows are not supported"
        )
    patch = _shape(shapes, "x_embedder.proj.weight", folder, 4)
    text = shapes.get("llm.embed_tokens.weight")
    return DecoderConfig(
        stack=StackConfig(
            hidden_size=hidden,
            num_layers=config["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads", heads),
            intermediate_size=config["intermediate_size"],
            rms_norm_eps=config["rms_norm_eps"],
            rope=phi3_rope(config),
            fused=True,
        ),
        latent_channels=patch[1],
        patch_size=patch[2],
        time_frequencies=_shape(shapes, "t_embedder.mlp.0.weight", folder, 2)[1],
        text_vocab_size=text[0] if text else 0,
    )


def _connector(decoder: DecoderConfig, shapes: Mapping[str, tuple[int, ...]], path: Path) -> ConnectorConfig:
    """The file itself says how wide its input is and how many layers it has; the rest is the decoder's."""
    layers = {int(head) for head in (name.split(".")[0] for name in shapes) if head.isdecimal() and len(head) < 5} - {0}
    if layers != set(range(1, len(layers) + 1)):
        raise BadCheckpointError(
            f"{path}/connector.safetensors: layers {sorted(layers)}; expected 1, 2, … without gaps"
        )
    return ConnectorConfig(
        input_size=_shape(shapes, "0.weight", path / "connector.safetensors", 2)[1],
        stack=replace(decoder.stack, num_layers=len(layers)),
    )


def _shape(shapes: Mapping[str, tuple[int, ...]], name: str, where: Path, axes: int) -> tuple[int, ...]:
    if name not in shapes:
        raise BadCheckpointError(f"{where}: tensor {name} is missing")
    if len(shapes[name]) != axes:
        raise BadCheckpointError(f"{where}: tensor {name} has shape {shapes[name]}; expected {axes} axes")
    return shapes[name]


def _vae(path: Path) -> VAEConfig:
    config = Keys(read_json(path), str(path))
    config.require(_VAE)
    for key, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        if any(block != kind for block in _list(config, key)):
            raise config.bad(key, f"{kind} alone; another block is not SDXL's VAE")
    return VAEConfig(
        block_out_channels=tuple(_list(config, "block_out_channels", needed=True)),
        layers_per_block=config["layers_per_block"],
        norm_num_groups=config["norm_num_groups"],
        in_channels=config.get("in_channels", 3),
        out_channels=config.get("out_channels", 3),
        latent_channels=config["latent_channels"],
        scaling_factor=config["scaling_factor"],
        shift_factor=config.get("shift_factor", 0.0),
    )


def _image(folder: Path, vision: VisionConfig) -> ImageConfig:
    """processor_config.json's image_processor where it has one, else preprocessor_config.json, as in transformers 5."""
    path = folder / "processor_config.json"
    config = Keys(optional_json(path), str(path)).part("image_processor")
    if not config.data:
        path = folder / "preprocessor_config.json"
        if not path.exists():
            raise BadCheckpointError(f"{path} is missing, and no processor_config.json holds an image_processor")
        config = Keys(read_json(path), str(path))
    # Near 1/255 is 1/255: files write it with varying digits.
    factor = config.get("rescale_factor", 1 / 255)
    if type(factor) is float and math.isclose(factor, 1 / 255, rel_tol=1e-9):
        config = Keys({**config.data, "rescale_factor": 1 / 255}, config.where)
    config.require(_IMAGE)
    config.require(
        {
            "patch_size": (vision.patch_size,),
            "temporal_patch_size": (vision.temporal_patch_size,),
            "merge_size": (vision.merge_size,),
        }
    )
    size, defaults = config.part("size"), ImageConfig()
    unknown = sorted(set(size.data) - {"shortest_edge", "longest_edge", "min_pixels", "max_pixels"})
    if unknown:
        raise config.bad("size", "shortest_edge and longest_edge")
    return ImageConfig(
        min_pixels=config.get("min_pixels", size.get("shortest_edge", 56 * 56)),
        max_pixels=config.get("max_pixels", size.get("longest_edge", 28 * 28 * 1280)),
        image_mean=tuple(_list(config, "image_mean") or defaults.image_mean),
        image_std=tuple(_list(config, "image_std") or defaults.image_std),
    )


def _generation(folder: Path, text: Keys, mllm: Keys) -> GenerationConfig:
    path = folder / "generation_config.json"
    config = Keys(optional_json(path), str(path))
    config.require(_GENERATION)
    eos = config.get("eos_token_id", text.get("eos_token_id", mllm.get("eos_token_id")))
    if eos is None:
        raise BadCheckpointError(f"{folder}: neither generation_config.json nor config.json gives eos_token_id")
    ids = tuple(eos) if isinstance(eos, list) else (eos,)
    if not ids or not all(type(token) is int and token >= 0 for token in ids):
        raise BadCheckpointError(f"{path}: eos_token_id = {shown(eos)}: expected a token id or a list of token ids")
    try:
        return GenerationConfig(eos_token_ids=ids, repetition_penalty=config.get("repetition_penalty", 1.0))
    except BadCheckpointError as error:
        raise BadCheckpointError(f"{path}: {error}") from error


def own_config(path: Path) -> dict[str, Any]:
    """mindomni.json: edit_features and recommended. Without the file they are the released checkpoint's."""
    config = Keys(optional_json(path), str(path))
    unknown = sorted(set(config.data) - {"edit_features", "recommended"})
    if unknown:
        raise BadCheckpointError(f"{path}: unknown keys {unknown}; expected edit_features, recommended")
    value = config.get("edit_features", "vit") if "edit_features" in config.data or not config.data else None
    if value not in EDIT_FEATURES:
        raise config.bad("edit_features", f"one of {', '.join(EDIT_FEATURES)}")
    try:
        recommended = recommended_config(config.part("recommended").data)
    except BadCheckpointError as error:
        raise BadCheckpointError(f"{path}: {error}") from error
    return {"edit_features": value, "recommended": recommended}
