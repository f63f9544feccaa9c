"""Which changes of a JSON file ask for another result. All others must be refused or change nothing."""

from __future__ import annotations

from typing import Any

# Settings: another number (or text, flag) is another model, and the program has no way to know which was meant.
SETTINGS = {
    "config.json": frozenset(
        ("rms_norm_eps", "rope_theta", "mrope_section", "eos_token_id", "num_attention_heads", "num_key_value_heads",
         "num_heads", "window_size", "fullatt_block_indexes", "max_position_embeddings", "norm_num_groups",
         "original_max_position_embeddings", "short_factor", "long_factor", "scaling_factor", "shift_factor",
         "image_token_id", "vision_start_token_id", "vision_end_token_id", "num_hidden_layers", "depth")
    ),
    "generation_config.json": frozenset(("eos_token_id", "repetition_penalty")),
    "preprocessor_config.json": frozenset(
        ("image_mean", "image_std", "min_pixels", "max_pixels", "shortest_edge", "longest_edge")
    ),
}  # fmt: skip


def reason(file: str, at: tuple[Any, ...], old: Any, new: Any) -> str:
    """Why the result may change, or an empty text."""
    name = file.rpartition("/")[2]
    keys = [key for key in at if isinstance(key, str)]
    if name in SETTINGS and keys and keys[-1] in SETTINGS[name] and _kind(old) == _kind(new):
        return f"another {keys[-1]}"
    return ""


def _kind(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(type(value))
    return "number" if isinstance(value, (int, float)) else type(value).__name__
