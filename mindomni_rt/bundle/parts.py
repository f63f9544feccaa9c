"""A graph in parts that run one after another: each takes the graph's own inputs and what earlier parts passed on."""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import BadBundleError
from .onnx_file import OnnxFile


def check_parts(where: str, whole: OnnxFile, parts: Iterable[tuple[str, OnnxFile]]) -> None:
    """Raises BadBundleError unless the parts, by file name and in order, give the outputs of the whole graph, each
    once, and take nothing but its inputs and what earlier parts give."""
    known, left = dict(whole.inputs), dict(whole.outputs)
    for file, part in parts:
        for name, shape in part.inputs.items():
            if known.get(name) != shape:
                raise BadBundleError(f"{where}/{file}: no earlier part gives its input {name!r} as {shape}")
        for name, shape in part.outputs.items():
            if name in known or left.pop(name, shape) != shape:
                raise BadBundleError(f"{where}/{file}: output {name!r} is given twice, or is not as in the whole graph")
            known[name] = shape
    if left:
        raise BadBundleError(f"{where}: no part gives output {min(left)!r}. Build the bundle again")
