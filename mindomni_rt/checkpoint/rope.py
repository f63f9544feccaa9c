"""Rotary embedding of a configuration file, in all of transformers' spellings."""

from __future__ import annotations

import math
from typing import Any

from ..checks import shown
from .config import RopeConfig
from .json_files import Keys

# Keys of a scaled embedding that no supported kind reads; a value there means another kind of scaling.
_FOREIGN = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "low_freq_factor", "high_freq_factor", "truncate")


def _settings(config: Keys, theta: float) -> tuple[Keys, str, float]:
    """The object that describes the embedding, its type and its base. rope_scaling counts before rope_parameters."""
    found = config.part("rope_scaling") if config.get("rope_scaling") else config.part("rope_parameters")
    kind = found.get("rope_type", found.get("type", "default"))
    for key in _FOREIGN:
        if found.get(key) is not None:
            raise found.bad(key, "no such key; this kind of scaling is not supported")
    partial = found.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if type(partial) not in (int, float) or partial != 1:
        raise config.bad("partial_rotary_factor", f"1, found {shown(partial)}; a partial one is not supported")
    return found, kind, found.get("rope_theta", config.get("rope_theta", theta))


def language_rope(config: Keys) -> RopeConfig:
    """Qwen2.5-VL's embedding on three axes."""
    found, kind, theta = _settings(config, 1e6)
    section = found.get("mrope_section", [16, 24, 24])
    if kind not in ("default", "mrope"):
        raise found.bad(
            "rope_type" if "rope_type" in found.data else "type",
            "default or mrope; a scaled embedding such as yarn is not supported here",
        )
    if found.get("factor") not in (None, 1, 1.0):
        raise found.bad("factor", "1 or no such key")
    if not isinstance(section, list):
        raise found.bad("mrope_section", "a list of three numbers")
    maximum = config["max_position_embeddings"]
    return RopeConfig(
        kind="mrope",
        theta=theta,
        mrope_section=tuple(section),
        original_max_positions=maximum,
        max_positions=maximum,
    )


def phi3_rope(config: Keys) -> RopeConfig:
    """Phi-3's plain embedding or LongRoPE, which older files call su."""
    found, kind, theta = _settings(config, 10000.0)
    maximum = config["max_position_embeddings"]
    if kind not in ("default", "longrope", "su"):
        raise found.bad("rope_type" if "rope_type" in found.data else "type", "default, longrope or su")
    if kind == "default":
        original = config.get("original_max_position_embeddings", maximum)
        return RopeConfig(kind="plain", theta=theta, original_max_positions=original, max_positions=maximum)
    original = config.get("original_max_position_embeddings", 4096)  # Phi3Config's default
    _same_scale(found, maximum, original)
    factors: dict[str, Any] = {name: found[name] for name in ("short_factor", "long_factor")}
    for name, values in factors.items():
        if not isinstance(values, list):
            raise found.bad(name, "a list of numbers")
    return RopeConfig(
        kind="longrope",
        theta=theta,
        original_max_positions=original,
        max_positions=maximum,
        **{name: tuple(values) for name, values in factors.items()},
    )


def _same_scale(found: Keys, maximum: Any, original: Any) -> None:
    """`factor` and `attention_factor` may only say what follows from the two context lengths."""
    if type(maximum) is not int or type(original) is not int or original < 2:
        return  # RopeConfig names what is wrong with them
    ratio = maximum / original
    scale = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
    for key, value in (("factor", ratio), ("attention_factor", scale)):
        given = found.get(key)
        if given is not None and (type(given) not in (int, float) or not math.isclose(given, value, rel_tol=1e-6)):
            raise found.bad(key, f"{value:g}, which follows from the context lengths, or no such key")
