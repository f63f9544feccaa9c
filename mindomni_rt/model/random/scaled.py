"""The published configuration scaled down: the same shape of model at a size that a CPU runs in seconds."""

from __future__ import annotations

from dataclasses import replace

from ...checkpoint.config import ModelConfig, published
from ...errors import BadRequestError
from .write import cut

SIZES = {"tiny": (16, 4), "small": (8, 6), "medium": (4, 8)}


def scaled(size: str) -> ModelConfig:
    """Sizes "tiny", "small", "medium": widths divided by 16, 8 or 4, at most 4, 6 or 8 layers; "published" as it is."""
    config = published()
    if size == "published":
        return config
    if size not in SIZES:
        raise BadRequestError(f"size {size!r}: expected one of {', '.join(SIZES)}, published")
    divide, layers = SIZES[size]
    found = cut(config, layers, divide)
    widths = tuple(max(width // min(divide, 8), 16) for width in config.vae.block_out_channels)
    return replace(
        found,
        language=replace(
            found.language,
            vocab_size=config.language.vocab_size // divide,
            image_token_id=5,
            vision_start_token_id=6,
            vision_end_token_id=7,
        ),
        vae=replace(config.vae, block_out_channels=widths, norm_num_groups=8),
    )
