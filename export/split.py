"""A graph of many layers as several that run one after another, so that a runtime opens them side by side.

onnxruntime rearranges the weights of a session on one core: seconds for the language model at the published size.
Each part is cut out of the whole graph between two layers, where one tensor passes; what follows from the inputs
alone (masks, tables) stands in every part that reads it. All parts refer to the same data file.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path

import onnx

from mindomni_rt.files import replace_file

from .weights import BuildError

_LAYER = re.compile(r"\.layers\.(\d+)\.")


def split(file: Path, layers: int, count: int, like: str) -> list[Path]:
    """Writes NAME.0.onnx, NAME.1.onnx, … beside NAME.onnx, as many as `count` but at most one a layer.

    layers: how many the graph has; their weights are named "….layers.N.…". like: the output whose type and shape the
    tensor between two layers has. Raises BuildError where more than one tensor passes.
    """
    model = onnx.load(str(file), load_external_data=False)
    graph, count = model.graph, min(count, layers)
    after = _last_layers(graph)
    ends = [layers * (place + 1) // count for place in range(count)]
    passed = next(value for value in graph.output if value.name == like)
    cuts = [onnx.ValueInfoProto() for _ in ends[1:]]
    for cut, end in zip(cuts, ends, strict=False):
        cut.CopyFrom(passed)
        cut.name = _between(graph, after, end, file.name)
    found = []
    for place, end in enumerate(ends):
        begin = ends[place - 1] if place else 0
        last = end == layers
        outputs = [o.name for o in graph.output if begin <= after[o.name] < end or (last and after[o.name] < 0)]
        part = _part(model, outputs, cuts[place - 1 : place] if place else [], cuts[place : place + 1])
        found.append(file.with_suffix(f".{place}.onnx"))
        replace_file(found[-1], partial(onnx.save, part))
    return found


def _last_layers(graph: onnx.GraphProto) -> dict[str, int]:
    """Each tensor -> the last layer that it depends on; -1 for none."""
    found = {value.name: -1 for value in graph.input}
    for tensor in graph.initializer:
        layer = _LAYER.search(f".{tensor.name}")
        found[tensor.name] = int(layer[1]) if layer else -1
    for node in graph.node:
        found |= dict.fromkeys(node.output, max((found[name] for name in node.input if name), default=-1))
    return found


def _between(graph: onnx.GraphProto, after: Mapping[str, int], layer: int, name: str) -> str:
    """The one tensor of the layers before `layer` that a later one reads."""
    found = {
        value
        for node in graph.node
        if after[node.output[0]] >= layer
        for value in node.input
        if value and 0 <= after[value] < layer
    } - {tensor.name for tensor in graph.initializer}
    if len(found) != 1:
        raise BuildError(f"{name}: {len(found)} tensors pass between layers {layer - 1} and {layer}, expected one")
    return found.pop()


def _part(
    model: onnx.ModelProto,
    outputs: Collection[str],
    before: Collection[onnx.ValueInfoProto],
    after: Collection[onnx.ValueInfoProto],
) -> onnx.ModelProto:
    """What computes some outputs, and the tensor `after`, from the inputs and the tensor `before`."""
    whole = model.graph
    wanted = {*outputs, *(value.name for value in after)}
    known = {value.name for value in before}
    nodes = []
    for node in reversed(whole.node):
        if wanted & set(node.output) - known:
            nodes.append(node)
            wanted.update(filter(None, node.input))
    part = onnx.ModelProto()
    part.CopyFrom(model)
    graph = part.graph
    for field in ("node", "initializer", "input", "output", "value_info"):
        graph.ClearField(field)
    graph.node.extend(reversed(nodes))
    for field in ("initializer", "input", "value_info"):
        getattr(graph, field).extend(value for value in getattr(whole, field) if value.name in wanted)
    graph.input.extend(before)
    graph.output.extend(value for value in whole.output if value.name in outputs)
    graph.output.extend(after)
    return part
