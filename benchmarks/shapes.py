"""What each kind of result file holds, as data."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

NUMBER, OPTIONAL_TEXT, OPTIONAL_NUMBER = (int, float), (str, type(None)), (int, float, type(None))
Shape = Any
"""A type or a tuple of types; a compiled pattern: text of that form; a list of one shape: a list of such values, not
empty; {str: shape}: any keys; {pattern: shape}: at least one key, and each of a form that is listed; {"name": shape}:
these keys and perhaps others, those that end in "?" only if they are there; `Part`."""


@dataclass(frozen=True)
class Part:
    """What one part of a run holds. A part that says why it did not end (WHYS) may lack some of it."""

    fields: dict[Any, Shape]


WHYS = ("failed", "skipped", "missing")
_COMMON: dict[Any, Shape] = {"format": int, "date": re.compile(r"\d{4}-\d\d-\d\d.{0,20}"), "commit": OPTIONAL_TEXT}
_MODEL = {"config": dict, "dtype": str}
_RUN = {**_COMMON, "machine": {str: (str, int, float, dict, type(None))}, "versions": {str: str}}

# Parts of a GPU run, by their names.
_PEAKS = {"peak_bytes": int, "reserved_bytes": int}
_DISTANCE = {"error": OPTIONAL_NUMBER, "bound": NUMBER, "baseline_error": OPTIONAL_NUMBER}
_JUDGED = {**_DISTANCE, "right": bool}
_MAYBE_JUDGED = {f"{name}?": shape for name, shape in _JUDGED.items()}
_STEP = {"prefixes_s": NUMBER, "step_s": NUMBER, "step_runs_s": [NUMBER], **_PEAKS}
_TOKENS = {"first_token_s": NUMBER, "token_s": NUMBER, "weight_bytes": NUMBER, **_PEAKS, "tokens": [int]}
_TOTAL = {"stages_s": {str: NUMBER}, "total_s": NUMBER, **_PEAKS}
_PAIR = {"n": int, "ratio": NUMBER, "low": NUMBER, "high": NUMBER, "ours_s": [NUMBER], "theirs_s": [NUMBER]}
_CASE = {"name": str, "right": bool, "failed?": str, "seconds?": {str: (int, float, str)}, **_MAYBE_JUDGED}
_BUDGET = {"precision": str, "resident": list, "room_bytes": int, "loads": int, "under": bool}
_LOSSY = {str: {"denoiser_s": NUMBER, "latent_distance": NUMBER}}
_SECTIONS: dict[str, dict[Any, Shape]] = {
    "ceilings": {"matmul": NUMBER, "copy": NUMBER, "fp8": OPTIONAL_NUMBER, "int8": OPTIONAL_NUMBER},
    r"eager \d+": {"error": NUMBER, "step_s": NUMBER, **_PEAKS},
    "plain hidden states": {"error": NUMBER},
    r"velocity \d+|hidden states": _JUDGED,
    r"ours \d+": _STEP,
    "decoding|language=[a-z0-9=,]+": _TOKENS,
    "decoder=[a-z0-9]+": {**_STEP, **_MAYBE_JUDGED},
    "request": {**_TOTAL, "side": int, "weight_bytes": NUMBER, "planned_bytes": int, "lossy (random weights)": _LOSSY},
    "transformers|diffusers": {"peer": str, **_DISTANCE, "agrees": bool, "note": str, "pairs?": {str: _PAIR}},
    "kernels": {"cases": [_CASE]},
    r"budget \d+\.\d\d GB": {**_TOTAL, **_BUDGET},
    "sweep": {"shared_limits": dict},
}  # fmt: skip

KINDS: Mapping[str, Shape] = {
    "latency": {
        **_RUN,
        "model": {**_MODEL, "name": str, "backend": str, "device": str},
        "workload": {"steps": int, "height": int, "width": int},
        "request": dict,
        "warmup": int,
        "tokens": [int],
        "runs": [{str: NUMBER}],
    },
    "counts": {
        **_COMMON,
        "model": {"config": dict},
        "request": dict,
        "torch": str,
        "stages": {str: {str: int}},
        "graphs": {str: {str: int}},
        "operators": {str: {str: int}},
    },
    "peers": {
        **_RUN,
        "model": _MODEL,
        "device": str,
        "groups": {str: {"peer": str, "pairs?": {str: dict}}},
    },
    "load": {
        **_RUN,
        "model": {"name": str},
        "requests": int,
        "clients": int,
        "seconds": NUMBER,
        "outcomes": {str: int},
        "latency_s": {str: NUMBER},
        "memory": {"early": NUMBER, "late": NUMBER, "growth": NUMBER, "samples": [NUMBER]},
    },
    "gpu": {
        **_COMMON,
        "command": str,
        "preset": re.compile("full|toy"),
        "model": _MODEL,
        "machine": {
            "gpu": OPTIONAL_TEXT,
            "versions": {str: OPTIONAL_TEXT},
            "sm?": int,
            "memory_bytes?": int,
            "cuda?": OPTIONAL_TEXT,
        },
        "wall_s": NUMBER,
        "sections": {re.compile(names): Part({**fields, "wall_s?": NUMBER}) for names, fields in _SECTIONS.items()},
    },
}
