"""Mutations of ONNX graphs: raw bytes, nodes, attributes, tensors, inputs and outputs, versions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx

from .change import Change, Random, flipped, pick
from .places import odd_name
from .sources import Source

OPERATORS = ("Identity", "Relu", "MatMul", "Add", "Transpose", "Reshape", "Expand", "Tile", "ConstantOfShape", "Loop", "If", "Scan",
             "Resize", "Pad", "Gather", "ScatterND", "Softmax", "Conv", "Range", "NonZero", "TopK", "Cast", "Einsum", "Slice", "Split",
             "SequenceEmpty", "RandomNormal", "QuantizeLinear", "StringNormalizer", "Nope", "")  # fmt: skip
NUMBERS = (0, 1, -1, 2, 3, 7, 2**31 - 1, 2**31, 2**40, 2**63 - 1, -(2**63))


def raw(rng: Random, source: Source) -> Change:
    name = pick(rng, source.files, ".onnx")
    return _changed(name, flipped(rng, source.files[name], 4), "bytes changed")


def node(rng: Random, source: Source) -> Change:
    def edit(rng: Random, model: Any) -> str:
        nodes = model.graph.node
        at = rng.randrange(len(nodes))
        one, action = nodes[at], rng.randrange(8)
        if action == 0:
            one.op_type = rng.choice(OPERATORS)
        elif action == 1:
            one.op_type = rng.choice([other.op_type for other in nodes])
        elif action == 2:
            del nodes[at]
        elif action == 3:
            nodes.add().CopyFrom(one)
        elif action == 4 and one.input:
            one.input[rng.randrange(len(one.input))] = rng.choice(
                [o for other in nodes for o in other.output] + ["", "x"]
            )
        elif action == 5 and len(one.input) > 1:
            first, second = one.input[0], one.input[1]
            one.input[0], one.input[1] = second, first
        elif action == 6:
            one.domain = rng.choice(("com.microsoft", "ai.onnx.ml", "x", "\udcff".encode("utf-8", "replace").decode()))
        else:
            del one.input[rng.randrange(len(one.input) + 1) :]
        return f"node {at}, kind {action}"

    return _edited(rng, source, edit)


def attribute(rng: Random, source: Source) -> Change:
    def edit(rng: Random, model: Any) -> str:
        found = [a for n in model.graph.node for a in n.attribute]
        if not found:
            del model.graph.node[:]
            return "no nodes"
        one = rng.choice(found)
        if one.type == onnx.AttributeProto.INT:
            one.i = rng.choice(NUMBERS)
        elif one.type == onnx.AttributeProto.INTS and one.ints:
            one.ints[rng.randrange(len(one.ints))] = rng.choice(NUMBERS)
        elif one.type == onnx.AttributeProto.FLOAT:
            one.f = rng.choice((0.0, -1.0, 1e38, float("nan"), float("inf")))
        elif one.type == onnx.AttributeProto.TENSOR:
            _tensor(rng, one.t)
        else:
            one.type = rng.choice((1, 2, 3, 4, 5, 6, 7, 99))
        return f"attribute {one.name}"

    return _edited(rng, source, edit)


def tensor(rng: Random, source: Source) -> Change:
    def edit(rng: Random, model: Any) -> str:
        found = list(model.graph.initializer) or [a.t for n in model.graph.node for a in n.attribute if a.HasField("t")]
        if not found:
            model.graph.initializer.add(name="x", data_type=1, dims=[2**40])
            return "initializer added"
        one = rng.choice(found)
        _tensor(rng, one)
        return f"tensor {one.name}"

    return _edited(rng, source, edit)


def _tensor(rng: Random, one: Any) -> None:
    if one.external_data and rng.random() < 0.7:
        entry = rng.choice(list(one.external_data))
        if entry.key == "location":
            entry.value = odd_name(rng, entry.value)
        else:
            entry.value = rng.choice(("0", "4", "-1", "x", "", str(2**40), str(2**63), str(2**64), "1e3", "9" * 400))
    elif rng.random() < 0.5 and one.dims:
        one.dims[rng.randrange(len(one.dims))] = rng.choice(NUMBERS)
    elif rng.random() < 0.5:
        one.data_type = rng.choice((0, 1, 2, 6, 7, 8, 9, 10, 11, 14, 16, 17, 99))
    elif one.raw_data:
        one.raw_data = rng.choice(
            (b"", one.raw_data[:-1], one.raw_data * 2, rng.randbytes(len(one.raw_data)), b"\x7f" * len(one.raw_data))
        )
    else:
        one.dims.append(rng.choice(NUMBERS))


def interface(rng: Random, source: Source) -> Change:
    def edit(rng: Random, model: Any) -> str:
        values = list(model.graph.input) + list(model.graph.output)
        one, action = rng.choice(values), rng.randrange(6)
        kind = one.type.tensor_type
        if action == 0:
            one.name = rng.choice((*[v.name for v in values], "x", ""))
        elif action == 1:
            kind.elem_type = rng.choice((0, 1, 7, 8, 9, 10, 16, 99))
        elif action == 2 and kind.shape.dim:
            rng.choice(list(kind.shape.dim)).dim_value = rng.choice(NUMBERS)
        elif action == 3 and kind.shape.dim:
            rng.choice(list(kind.shape.dim)).dim_param = rng.choice(("x", "tokens", ""))
        elif action == 4:
            kind.shape.dim.add().dim_value = 1
        else:
            where = rng.choice((model.graph.input, model.graph.output))
            where.remove(rng.choice(list(where)))
        return f"{one.name}, kind {action}"

    return _edited(rng, source, edit)


def version(rng: Random, source: Source) -> Change:
    def edit(rng: Random, model: Any) -> str:
        action = rng.randrange(4)
        if action == 0:
            model.ir_version = rng.choice((0, 1, 3, 99, 2**62, -1))
        elif action == 1:
            rng.choice(list(model.opset_import)).version = rng.choice((0, 1, 7, 13, 25, 99, 2**62, -1))
        elif action == 2:
            del model.opset_import[:]
        else:
            model.metadata_props.add(key="x" * 10**5, value="y")
        return f"version, kind {action}"

    return _edited(rng, source, edit)


def grown(rng: Random, source: Source) -> Change:
    """A graph that would compute for ever or fill memory: a loop without end, a tensor of 40 GB, shapes that double."""

    def edit(rng: Random, model: Any) -> str:
        helper, nodes = onnx.helper, model.graph.node
        action = rng.randrange(4)
        where = model.graph.output[0].name
        for one in nodes:
            one.output[:] = ["before_" + o if o == where else o for o in one.output]
        constant = lambda name, value, kind=7: nodes.append(  # noqa: E731
            helper.make_node("Constant", [], [name], value=helper.make_tensor(name, kind, [len(value)], value))
        )
        if action == 0:
            body = helper.make_graph(
                [helper.make_node("Identity", ["c"], ["c2"]), helper.make_node("Add", ["v", "v"], ["v2"])], "body",
                [helper.make_tensor_value_info("i", 7, []), helper.make_tensor_value_info("c", 9, []), helper.make_tensor_value_info("v", 1, None)],
                [helper.make_tensor_value_info("c2", 9, []), helper.make_tensor_value_info("v2", 1, None)],
            )  # fmt: skip
            nodes.append(helper.make_node("Loop", ["", "", "before_" + where], [where], body=body))
        elif action == 1:
            constant("much", [10**5, 10**5])
            nodes.append(helper.make_node("ConstantOfShape", ["much"], ["filled"]))
            nodes.append(helper.make_node("ReduceSum", ["filled"], ["total"], keepdims=0))
            nodes.append(helper.make_node("Add", ["before_" + where, "total"], [where]))
        elif action == 2:
            constant("most", [10**11])
            nodes.append(helper.make_node("Expand", ["before_" + where, "most"], [where]))
        else:
            name = "before_" + where
            for index in range(40):
                nodes.append(helper.make_node("Concat", [name, name], [f"twice_{index}"], axis=0))
                name = f"twice_{index}"
            nodes.append(helper.make_node("Identity", [name], [where]))
        return f"grown, kind {action}"

    return _edited(rng, source, edit)


def _edited(rng: Random, source: Source, edit: Callable[[Random, Any], str]) -> Change:
    name = pick(rng, source.files, ".onnx")
    model = onnx.ModelProto.FromString(source.files[name])
    note = edit(rng, model)
    return _changed(name, model.SerializeToString(), note)


def _changed(name: str, data: bytes, note: str) -> Change:
    images = name in ("vision.onnx", "vae_encode.onnx", "features.onnx")
    return Change(files={name: data}, note=f"{name}: {note}", asked="another graph", needs_image=images)


MUTATIONS: dict[str, Callable[[Random, Source], Change]] = {
    "graph bytes": raw,
    "graph node": node,
    "graph attribute": attribute,
    "graph tensor": tensor,
    "graph interface": interface,
    "graph version": version,
    "graph growth": grown,
}
