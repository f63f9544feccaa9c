"""What a compiled graph takes and gives, as its file or session says, against its contract."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import BadBundleError
from .contracts import GraphSpec, TensorSpec


@dataclass(frozen=True)
class TensorShape:
    """A tensor's type by the names of `contracts.DTYPE_BYTES`, and its axes: a fixed size, or None for a free one."""

    dtype: str
    axes: tuple[int | None, ...]


Interface = dict[str, TensorShape]


def check_interface(
    where: str, spec: GraphSpec, dtype: str, inputs: Mapping[str, TensorShape], outputs: Mapping[str, TensorShape]
) -> None:
    """Raises BadBundleError unless a graph's inputs and outputs are those of its contract.

    where: names the file in the message. dtype: what the contract's "model" stands for. An input that the arithmetic
    does not need may be absent, since exporters drop it; an output may not.
    """
    specs = {t.name: t for t in spec.inputs}, {t.name: t for t in spec.outputs}
    for kind, found, wanted in (("input", inputs, specs[0]), ("output", outputs, specs[1])):
        for name in sorted(set(found) - set(wanted)):
            raise BadBundleError(f"{where}: {kind} {name!r} is not in the contract of graph {spec.name}")
        for name, shape in found.items():
            _check(f"{where}: {kind} {name!r}", wanted[name], dtype, shape)
    for name in sorted(set(specs[1]) - set(outputs)):
        raise BadBundleError(f"{where}: output {name!r}, which the contract of graph {spec.name} promises, is missing")


def _check(where: str, spec: TensorSpec, dtype: str, found: TensorShape) -> None:
    expected = dtype if spec.dtype == "model" else spec.dtype
    if found.dtype != expected:
        raise BadBundleError(f"{where} is {found.dtype}; expected {expected}")
    if len(found.axes) != len(spec.axes):
        raise BadBundleError(f"{where} has {len(found.axes)} axes; expected {len(spec.axes)}: {spec.axes}")
    for size, axis in zip(found.axes, spec.axes, strict=True):
        if isinstance(axis, int) and size not in (axis, None):
            raise BadBundleError(f"{where} has the shape {found.axes}; expected {spec.axes}")
