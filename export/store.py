"""Weights beside graphs: one data file for several graphs, each tensor in it once.

`prefix`, `denoiser` and `denoiser_first` are three graphs over one stack of 3.6 billion parameters; on disk they
share them. Graphs are written without the tracer's notes, so the same checkpoint gives the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx_ir as ir

from mindomni_rt.bundle.contracts import GraphSpec
from mindomni_rt.files import replace_file

_INLINE = 1024  # bytes; smaller tensors stay in the graph
_ALIGN = 4096  # a page, so that a tensor can be mapped


class WeightStore:
    """An append-only data file that stores equal tensors once. Close it before the graphs are read.

    made: what was computed for a weight of this file, by a key of the caller's: graphs over the same weights ask once.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.made: dict[Hashable, Any] = {}
        self._places: dict[bytes, tuple[int, int]] = {}
        self._file: BinaryIO = path.open("xb")  # never over the weights of another graph

    def add(self, data: bytes | memoryview) -> tuple[int, int]:
        """Stores data unless it is there; returns (offset, length)."""
        key = hashlib.sha256(data).digest()
        if key not in self._places:
            self._file.write(b"\0" * (-self._file.tell() % _ALIGN))
            self._places[key] = (self._file.tell(), len(data))
            self._file.write(data)
        return self._places[key]

    def tensor(self, name: str, value: ir.TensorProtocol) -> ir.TensorProtocol:
        """The same tensor, by reference to this file; a small one stays as it is."""
        if value.nbytes <= _INLINE:
            return ir.Tensor(value.numpy(), dtype=value.dtype, name=name)
        if isinstance(value, ir.ExternalTensor) and Path(value.path) == self.path:
            return value
        key = ("whole", name, value.dtype)  # a checkpoint's weight has one name in all graphs of a file
        if not isinstance(value, ir.LazyTensor) or key not in self.made:
            self.made[key] = self._place(name, _bytes(value), value.dtype, tuple(value.shape.numpy()))
        found: ir.ExternalTensor = self.made[key]
        return found

    def _place(
        self, name: str, data: bytes | memoryview, dtype: ir.DataType, shape: Sequence[int]
    ) -> ir.ExternalTensor:
        """A tensor of these bytes, by reference to this file."""
        offset, length = self.add(data)
        return ir.ExternalTensor(
            self.path.name, offset, length, dtype, shape=ir.Shape(shape), name=name, base_dir=str(self.path.parent)
        )

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> WeightStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _bytes(value: ir.TensorProtocol) -> bytes | memoryview:
    """A tensor's bytes as ONNX stores them, without a copy where numpy has the type."""
    if value.dtype.bitwidth < 8:
        return value.tobytes()
    return np.ascontiguousarray(value.numpy()).reshape(-1).view(np.uint8).data


def write_graph(model: ir.Model, path: Path, store: WeightStore) -> None:
    """Writes a traced model, its weights into the store, one at a time."""
    for name, value in model.graph.initializers.items():
        if value.const_value is not None:
            value.const_value = store.tensor(str(name), value.const_value)
    model.producer_name, model.producer_version = "mindomni-rt", None
    replace_file(path, lambda temporary: ir.save(model, temporary, format="protobuf"))


def name_axes(model: ir.Model, spec: GraphSpec) -> None:
    """Checks inputs and outputs against the contract and gives free axes its names."""
    graph = model.graph
    for values, tensors in ((graph.inputs, spec.inputs), (graph.outputs, spec.outputs)):
        assert [v.name for v in values] == [t.name for t in tensors], [v.name for v in values]
        for value, tensor in zip(values, tensors, strict=True):
            assert value.shape is not None and len(value.shape) == len(tensor.axes), (tensor, value.shape)
            for index, axis in enumerate(tensor.axes):
                found = value.shape[index]
                frozen = isinstance(axis, str) and isinstance(found, int)
                wrong = isinstance(axis, int) and isinstance(found, int) and found != axis
                assert not frozen and not wrong, f"{spec.name}: {tensor.name} axis {index} is {found}, not {axis}"
            value.shape = ir.Shape([a if isinstance(a, int) else a.replace("*", "x") for a in tensor.axes])


def strip_notes(model: ir.Model) -> None:
    """Removes the tracer's notes: stack traces with paths of the machine that built it."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.doc_string = model.graph.doc_string = None
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def fold_transposes(graph: ir.Graph) -> None:
    """Stores weights the way MatMul reads them: Transpose(weight) becomes a weight, one at a time."""
    for node in list(graph):
        if node.op_type != "Transpose" or node.domain not in ("", "ai.onnx"):
            continue
        (source,), (target,) = node.inputs, node.outputs
        if source is None or source.const_value is None or source.name not in graph.initializers:
            continue
        if len(source.shape or ()) != 2 or target.is_graph_output():
            continue
        weight = transposed(graph, source)
        target.replace_all_uses_with(weight)
        graph.remove(node, safe=True)
        if not source.uses():
            del graph.initializers[str(source.name)]


def transposed(graph: ir.Graph, source: ir.Value) -> ir.Value:
    """The transpose of a stored matrix as an initializer "NAME.T" of the graph, made once."""
    assert source.const_value is not None and source.shape is not None
    name = f"{source.name}.T"
    weight = ir.Value(
        name=name,
        type=source.type,
        shape=ir.Shape(tuple(source.shape)[::-1]),  # type: ignore[arg-type]
        const_value=_transposed(source.const_value, name),
    )
    return graph.initializers.setdefault(name, weight)


def _transposed(source: ir.TensorProtocol, name: str) -> ir.LazyTensor:
    """The tensor transposed, made when it is written: never two copies of the model."""
    shape = ir.Shape(source.shape.numpy()[::-1])

    def make() -> ir.TensorProtocol:
        return ir.Tensor(source.numpy().T, dtype=source.dtype, name=name)  # seen from the other side, not turned

    return ir.LazyTensor(make, dtype=source.dtype, shape=shape, name=name, cache=False)
