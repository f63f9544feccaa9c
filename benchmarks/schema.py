"""What a result file holds, by its kind."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

FORMAT = 1
NUMBER, OPTIONAL_TEXT = (int, float), (str, type(None))
Shape = Any
"""A type or a tuple of types; a list of one shape: a list of such values, not empty; {str: shape}: any keys;
{"name": shape}: these keys and perhaps others, those that end in "?" only if they are there."""

_COMMON: dict[Any, Shape] = {"format": int, "date": str, "commit": OPTIONAL_TEXT}
_MODEL = {"config": dict, "dtype": str}
_RUN = {**_COMMON, "machine": {str: (str, int, float, dict, type(None))}, "versions": {str: str}}
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
        "preset": str,
        "model": _MODEL,
        "machine": {"gpu": OPTIONAL_TEXT, "versions": {str: OPTIONAL_TEXT}},
        "wall_s": NUMBER,
        "sections": {str: dict},
    },
}


def problems(data: Any) -> list[str]:
    """What is wrong with a result, one line each; empty for a good one. Only finite numbers are good."""
    if not isinstance(data, dict) or data.get("kind") not in KINDS:
        kind = data.get("kind") if isinstance(data, dict) else type(data).__name__
        return [f"kind {kind!r}: expected one of {', '.join(KINDS)}"]
    if data.get("format") != FORMAT:
        return [f"format {data.get('format')!r}: expected {FORMAT}"]
    return list(_faults(data, KINDS[data["kind"]], "")) + list(_not_finite(data, ""))


def _faults(value: Any, shape: Shape, where: str) -> Iterator[str]:
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            yield f"{where.rstrip('.') or 'the file'}: expected an object"
            return
        for key, inner in shape.items():
            if key is str:
                for name, item in value.items():
                    yield from _faults(item, inner, f"{where}{name}.")
            elif key.removesuffix("?") in value:
                yield from _faults(value[key.removesuffix("?")], inner, f"{where}{key.removesuffix('?')}.")
            elif not key.endswith("?"):
                yield f"lacks {where}{key}"
    elif isinstance(shape, list):
        if not isinstance(value, list) or not value:
            yield f"{where.rstrip('.')}: expected a list that is not empty"
            return
        for index, item in enumerate(value):
            yield from _faults(item, shape[0], f"{where}{index}.")
    elif not isinstance(value, shape) or (isinstance(value, bool) and shape is not bool):
        kinds = shape if isinstance(shape, tuple) else (shape,)
        names = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
        yield f"{where.rstrip('.')}: expected {names}, found {value!r:.40}"


def _not_finite(value: Any, where: str) -> Iterator[str]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _not_finite(item, f"{where}{key}.")
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{where.rstrip('.')}: {value} is no finite number"
