"""A graph of few layers made into one of many: tracing takes longer the more layers there are; inner ones are alike.

A stack of `SHORT` layers is traced. Its two inner layers are compared node by node; what differs between them must be
the layer's number: in the names of weights, inputs and outputs, or in a constant index. The second is then repeated and
the last layer renumbered. Whatever else differs is an error, never a guess.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from mindomni_rt.bundle.contracts import GraphSpec
from mindomni_rt.checkpoint.config import ModelConfig

SHORT = 4
_PARTS = {
    "language": "language",
    "connector": "connector",
    "prefix": "decoder",
    "denoiser": "decoder",
    "denoiser_first": "decoder",
}
_WEIGHT = re.compile(r"^(.*\.layers\.|connector\.)(\d+)(\..*)$")
_NUMBERED = re.compile(r"^(.*_)(\d\d)$")


class UnlikeLayersError(ValueError):
    """Layers differ in more than their number: the graph has to be traced whole."""


def shortened(config: ModelConfig, graph: str) -> ModelConfig:
    """The configuration with `SHORT` layers in the stack of a graph, or as it is where there are no more."""
    part = _PARTS.get(graph)
    owner: Any = getattr(config, part) if part else None
    if owner is None or owner.stack.num_layers <= SHORT:
        return config
    return replace(config, **{str(part): replace(owner, stack=replace(owner.stack, num_layers=SHORT))})


def lengthen(model: ir.Model, spec: GraphSpec, layers: int) -> None:
    """Makes a trace of `SHORT` layers one of `layers`, in place. spec: of the whole graph.

    Raises UnlikeLayersError; the model is of no more use then.
    """
    _Stack(model, spec, layers).run()


def layers_of(config: ModelConfig, graph: str) -> int:
    """Layers in the stack of a graph, 0 for a graph whose layers are not all alike."""
    part = _PARTS.get(graph)
    return int(getattr(config, part).stack.num_layers) if part else 0


class _Stack:
    def __init__(self, model: ir.Model, spec: GraphSpec, layers: int) -> None:
        assert layers > SHORT
        self.model, self.graph, self.spec, self.layers = model, model.graph, spec, layers
        self.first = _first_number(spec)
        nodes = list(self.graph)
        starts = [next(i for i, n in enumerate(nodes) if self._layer(n) == k) for k in range(SHORT)]
        _require(starts == sorted(starts), spec.name, "layers out of order")
        self.one, self.two = nodes[starts[1] : starts[2]], nodes[starts[2] : starts[3]]
        self.rest = nodes[starts[3] :]
        _require([_kind(n) for n in self.one] == [_kind(n) for n in self.two], spec.name, "layers 1 and 2 differ")
        self.pair = {
            a: b for n, m in zip(self.one, self.two, strict=True) for a, b in zip(n.outputs, m.outputs, strict=True)
        }
        self.fringe = self._fringe()
        self.new_inputs: dict[str, ir.Value] = {}

    def _layer(self, node: ir.Node) -> int | None:
        found = [_WEIGHT.match(v.name or "") for v in node.inputs if v is not None]
        return next((int(m[2]) - self.first for m in found if m), None)

    def _fringe(self) -> list[tuple[ir.Node, ir.Node]]:
        """Nodes behind the stack that each serve one layer, such as Unsqueeze before the layers are joined."""
        found = []
        for node in self.rest:
            ins = [v for v in node.inputs if v in self.pair]
            if not ins or any(self.pair[v] in node.inputs for v in ins):
                continue
            wanted = [self.pair.get(v, v) if v is not None else None for v in node.inputs]
            twin = next((m for m in self.rest if m.op_type == node.op_type and list(m.inputs) == wanted), None)
            if twin is None:
                raise UnlikeLayersError(f"{self.spec.name}: {node.name} reads layer 1 alone")
            found.append((node, twin))
            self.pair |= dict(zip(node.outputs, twin.outputs, strict=True))
        return found

    def run(self) -> None:
        second = set(self.pair.values())
        newest = {v: v for v in second}  # of each value of layer 2, that of the layer made last
        joined: dict[ir.Value, list[ir.Value]] = {v: [] for v in second}
        place, behind = self.two[-1], [twin for _, twin in self.fringe]
        for number in range(SHORT - 1, self.layers - 1):
            before, made = newest, dict[ir.Value, ir.Value]()
            inner = [self._clone(n, m, number, before, made) for n, m in zip(self.one, self.two, strict=True)]
            self.graph.insert_after(place, inner)
            place = inner[-1]
            for index, (n, m) in enumerate(self.fringe):
                copy = self._clone(n, m, number, before, made)
                self.graph.insert_after(behind[index], copy)
                behind[index] = copy
            newest = made
            for value, new in made.items():
                joined[value].append(new)
        self._join(joined, newest)
        self._renumber_last()
        self._ends()

    def _clone(
        self,
        one: ir.Node,
        two: ir.Node,
        number: int,
        before: dict[ir.Value, ir.Value],
        made: dict[ir.Value, ir.Value],
    ) -> ir.Node:
        inputs = [self._input(two, a, b, number, before, made) for a, b in zip(one.inputs, two.inputs, strict=True)]
        outputs = []
        for value in two.outputs:
            name = self._renamed(str(value.name), number) if value.is_graph_output() else f"{value.name}.{number}"
            made[value] = ir.Value(name=name, type=value.type, shape=value.shape)
            outputs.append(made[value])
        attributes = [ir.Attr(a.name, a.type, a.value) for a in two.attributes.values()]
        return ir.Node(
            two.domain,
            two.op_type,
            inputs,
            attributes,
            outputs=outputs,
            name=f"{two.name}.{number}",
            version=two.version,
        )

    def _input(
        self,
        node: ir.Node,
        one: ir.Value | None,
        two: ir.Value | None,
        number: int,
        before: dict[ir.Value, ir.Value],
        made: dict[ir.Value, ir.Value],
    ) -> ir.Value | None:
        if one is two or two is None or one is None:
            _require(one is two, self.spec.name, f"{node.name} has other inputs in layers 1 and 2")
            return two
        if two in made:
            return made[two]
        if two in self.pair:  # what layer 1 gave: for the copy it is what the layer before gave
            return before[self.pair[two]]
        if two.is_graph_input():
            name = self._renamed(str(two.name), number)
            return self.new_inputs.setdefault(name, ir.Value(name=name, type=two.type, shape=two.shape))
        stored = two.name in self.graph.initializers and one.name in self.graph.initializers
        _require(stored, self.spec.name, f"{one.name} and {two.name} differ")
        if _WEIGHT.match(str(two.name)):
            return self._initializer(self._renamed(str(two.name), number), two, None)
        return self._stepped(one, two, number)

    def _stepped(self, one: ir.Value, two: ir.Value, number: int) -> ir.Value:
        """A constant that grows by the layer, such as the index of its part of a stacked input."""
        a, b = (_numbers(v) for v in (one, two))
        numbers = a.shape == b.shape and a.dtype == b.dtype and a.dtype.kind == "i" and bool((b - a == 1).all())
        _require(numbers, self.spec.name, f"{one.name} and {two.name} are no layer's numbers")
        return self._initializer(f"{two.name}.{number}", two, b + (number - 2))

    def _initializer(self, name: str, like: ir.Value, values: np.ndarray[Any, Any] | None) -> ir.Value:
        if name not in self.graph.initializers:
            tensor = None if values is None else ir.Tensor(values, name=name)
            new = ir.Value(name=name, type=like.type, shape=like.shape, const_value=tensor)
            self.graph.initializers[name] = new
        return self.graph.initializers[name]

    def _renamed(self, name: str, number: int) -> str:
        """A name of layer 2 (or the last one) as that of another layer."""
        weight, numbered = _WEIGHT.match(name), _NUMBERED.match(name)
        if weight:
            return f"{weight[1]}{number + self.first}{weight[3]}"
        assert numbered, name
        return f"{numbered[1]}{number:02d}"

    def _join(self, joined: dict[ir.Value, list[ir.Value]], newest: dict[ir.Value, ir.Value]) -> None:
        """Nodes behind the layers: lists of all layers' values grow, the last layer reads the newest."""
        mine = {m for _, m in self.fringe} | {n for n, _ in self.fringe}
        back = {b: a for a, b in self.pair.items()}
        for node in self.rest:
            if node in mine:
                continue
            inputs: list[ir.Value | None] = []
            for value in node.inputs:
                if value not in back:
                    inputs.append(value)
                elif back[value] in node.inputs:
                    inputs += [value, *joined[value]]
                else:
                    inputs.append(newest[value])
            if len(inputs) == len(node.inputs):
                for index, value in enumerate(inputs):
                    node.replace_input_with(index, value)
            else:
                longer = ir.Node(
                    node.domain, node.op_type, inputs, list(node.attributes.values()), num_outputs=1, name=node.name
                )
                longer.outputs[0].type = node.outputs[0].type
                ir.convenience.replace_nodes_and_values(
                    self.graph, node, [node], [longer], node.outputs, longer.outputs
                )

    def _renumber_last(self) -> None:
        """The last layer takes the last number: weights' names, and constants where layer 2 has a growing one."""
        last = self.layers - 1
        inner = [n for n in self.rest if n.graph is not None]
        growing = {
            (m.op_type, i, m.inputs[0]): int(_numbers(b).reshape(-1)[0])
            for n, m in zip(self.one, self.two, strict=True)
            for i, (a, b) in enumerate(zip(n.inputs, m.inputs, strict=True))
            if a is not b and b is not None and i and b.const_value is not None and not _WEIGHT.match(str(b.name))
        }
        for node in inner:
            for index, value in enumerate(node.inputs):
                if value is None:
                    continue
                match = _WEIGHT.match(str(value.name))
                if match and value.is_initializer() and int(match[2]) == SHORT - 1 + self.first:
                    node.replace_input_with(index, self._last_weight(value, last))
                elif (node.op_type, index, node.inputs[0]) in growing:
                    last_number = bool((_numbers(value) == SHORT - 1).all())
                    _require(last_number, self.spec.name, f"{node.name} does not read the last layer's part")
                    new = self._initializer(f"{value.name}.{last}", value, _numbers(value) + (last - SHORT + 1))
                    node.replace_input_with(index, new)

    def _last_weight(self, value: ir.Value, last: int) -> ir.Value:
        return self._initializer(self._renamed(str(value.name), last), value, None)

    def _ends(self) -> None:
        """Inputs and outputs of the graph in the order and sizes of its contract."""
        for values, tensors in ((self.graph.inputs, self.spec.inputs), (self.graph.outputs, self.spec.outputs)):
            outs = values is self.graph.outputs
            found: dict[str, ir.Value] = {}
            for value in values:
                numbered = _NUMBERED.match(str(value.name))
                if numbered and int(numbered[2]) == SHORT - 1:
                    value.name = f"{numbered[1]}{self.layers - 1:02d}"
                found[str(value.name)] = value
            made = {str(v.name): v for n in self.graph for v in n.outputs} if outs else self.new_inputs
            ordered = [found.get(t.name) or made[t.name] for t in tensors]
            values.clear()
            values.extend(ordered)
            for value, tensor in zip(ordered, tensors, strict=True):
                assert value.shape is not None, tensor.name
                sizes = [
                    axis if isinstance(axis, int) and size == SHORT and axis == self.layers else size
                    for axis, size in zip(tensor.axes, value.shape, strict=True)
                ]
                value.shape = ir.Shape(sizes)
        for node in self.rest:
            for value in node.outputs:
                if not value.is_graph_output():
                    value.shape = None


def _require(condition: bool, graph: str, what: str) -> None:
    if not condition:
        raise UnlikeLayersError(f"{graph}: {what}")


def _kind(node: ir.Node) -> tuple[str, str, str]:
    attributes = sorted((a.name, str(a.value)) for a in node.attributes.values())
    return node.domain, node.op_type, str(attributes)


def _first_number(spec: GraphSpec) -> int:
    return 1 if spec.name == "connector" else 0  # connector.0 is a Linear; its layers follow


def _numbers(value: ir.Value) -> np.ndarray[Any, Any]:
    assert value.const_value is not None, value.name
    return np.asarray(value.const_value.numpy())
