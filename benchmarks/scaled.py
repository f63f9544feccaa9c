"""The published configuration scaled down: the same shape of model at a size that a CPU runs in seconds."""

from __future__ import annotations

from dataclasses import replace

from mindomni_rt.checkpoint.config import ModelConfig, StackConfig, published
from mindomni_rt.errors import BadRequestError

SIZES = {"tiny": (16, 4), "small": (8, 6), "medium": (4, 8)}


def scaled(size: str) -> ModelConfig:
    """Sizes "tiny", "small", "medium": widths divided by 16, 8 or 4, at most 4, 6 or 8 layers; "published" as it is."""
    if size == "published":
        return published()
    if size not in SIZES:
        raise BadRequestError(f"size {size!r}: expected one of {', '.join(SIZES)}, published")
    divide, layers = SIZES[size]
    config = published()

    def stack(s: StackConfig, heads_by: int) -> StackConfig:
        heads = max(s.num_heads // heads_by, 1)
        kv = heads if s.num_kv_heads == s.num_heads else 1
        return replace(
            s,
            hidden_size=heads * s.head_dim,
            num_heads=heads,
            num_kv_heads=kv,
            intermediate_size=s.intermediate_size // divide // 16 * 16,
            num_layers=min(s.num_layers, layers),
        )

    language = stack(config.language.stack, divide)
    decoder = stack(config.decoder.stack, divide)
    connector = stack(config.connector.stack, divide)
    vision = replace(
        config.vision,
        hidden_size=config.vision.hidden_size // divide,
        num_heads=max(config.vision.num_heads // divide, 1),
        num_layers=min(config.vision.num_layers, layers),
        intermediate_size=config.vision.intermediate_size // divide // 4 * 4,
        out_hidden_size=language.hidden_size,
        full_attention_layers=(layers - 1,),
    )
    return replace(
        config,
        vision=vision,
        language=replace(
            config.language,
            stack=language,
            vocab_size=config.language.vocab_size // divide,
            image_token_id=5,
            vision_start_token_id=6,
            vision_end_token_id=7,
        ),
        connector=replace(config.connector, input_size=language.hidden_size, stack=connector),
        decoder=replace(config.decoder, stack=decoder),
        vae=replace(
            config.vae,
            block_out_channels=tuple(max(w // min(divide, 8), 16) for w in config.vae.block_out_channels),
            norm_num_groups=8,
        ),
    )
