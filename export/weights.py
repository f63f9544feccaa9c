"""What a written graph holds: its weights' types, read back from the file and compared with what the manifest says."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import TensorProto

from mindomni_rt.bundle.contracts import GraphSpec
from mindomni_rt.errors import MindOmniError
from mindomni_rt.memory.precision import KINDS, kind

_TYPES = {"FLOAT": "float32", "FLOAT8E4M3FN": "fp8", "FLOAT4E2M1": "fp4"}
_BITS = {"int4": 4, "uint4": 4, "fp4": 4, "bool": 8}
# How each precision's numbers are stored, and the block that a matrix's inner axis must divide into: others take int8.
_STORED = {"int8": "int8", "int8wo": "int8", "fp8": "fp8", "int4": "int4", "nvfp4": "fp4"}
BLOCK = 16
_PASSED = ("Cast", "DequantizeLinear", "Identity", "Reshape", "Transpose")  # between a stored matrix and its product
MICROSOFT = "com.microsoft"  # onnxruntime's own operators
_PRODUCTS = ("Conv", "Einsum", "Gather", "Gemm", "MatMul")
_LAYER = re.compile(r"\.layers\.\d+\.")
# Small or sensitive: patch and time embeddings, the final layer. They stay in the type that the graph computes in.
_KEPT = re.compile(r"^(embed|decoder\.(time_token|t_embedder|final_layer))\.")


class BuildError(MindOmniError, RuntimeError):
    """A build made something else than it promised. Nothing was written under the bundle's name."""


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One stored tensor. type: as stored; op: the product that reads it, "" for norms, biases, scales and constants."""

    name: str
    type: str
    shape: tuple[int, ...]
    op: str = ""

    @property
    def bytes(self) -> int:
        bits = _BITS.get(self.type) or int(re.sub(r"\D", "", self.type) or 8)
        return -(-math.prod(self.shape) * bits // 8)

    @property
    def role(self) -> str:
        """ "products" of the blocks, "head", input "table", or "rest"."""
        if not self.op or len(self.shape) < 2:
            return "rest"
        if self.op == "Gather":
            return "table"
        if ".lm_head." in self.name or ".embed_tokens." in self.name:
            return "head"
        return "products" if _LAYER.search(f".{self.name}") or not _KEPT.search(self.name) else "rest"


def read_weights(path: Path) -> list[Weight]:
    """All tensors of an ONNX file; data files are not opened."""
    graph = onnx.load(str(path), load_external_data=False).graph
    stored = [(t.name, t) for t in graph.initializer]
    stored += [
        (node.output[0], a.t)
        for node in graph.node
        for a in node.attribute
        if node.op_type == "Constant" and a.HasField("t")
    ]
    readers: dict[str, list[tuple[onnx.NodeProto, int]]] = {}
    for node in graph.node:
        for index, name in enumerate(node.input):
            readers.setdefault(name, []).append((node, index))

    packed = {n.input[1]: n for n in graph.node if n.domain == MICROSOFT and n.op_type == "MatMulNBits"}

    def products(name: str) -> Iterator[str]:
        for node, index in readers.get(name, ()):
            if node.op_type in _PRODUCTS:
                yield node.op_type if node.op_type != "Gather" or index == 0 else ""
            elif node.op_type in _PASSED and index == 0:
                yield from products(node.output[0])

    return [
        _packed(name, packed[name])
        if name in packed
        else Weight(name=name, type=_type(t), shape=tuple(t.dims), op=next(filter(None, products(name)), ""))
        for name, t in stored
    ]


def _packed(name: str, node: onnx.NodeProto) -> Weight:
    """The matrix that a MatMulNBits reads: stored as bytes, of `bits` a number."""
    found = {a.name: a.i for a in node.attribute}
    return Weight(name=name, type=f"int{found['bits']}", shape=(found["K"], found["N"]), op=node.op_type)


def _type(tensor: TensorProto) -> str:
    name = TensorProto.DataType.Name(tensor.data_type)
    return _TYPES.get(name, name.lower())


def bytes_by_type(weights: Iterable[Weight]) -> dict[str, int]:
    """Bytes of each type, the largest first."""
    found: Counter[str] = Counter()
    for weight in weights:
        found[weight.type] += weight.bytes
    return dict(found.most_common())


def promise(spec: GraphSpec, precision: str, dtype: str) -> dict[str, str]:
    """What a graph's weights are rounded to, by role, as the manifest records it. dtype: what the graph computes in.

    Blocks' matrices in the graph's precision, the head in 8 bits, the input table in 16, the rest as it computes.
    """
    if precision == "mixed":
        return {"attention": "float16", "rest": "float32"}
    if kind(precision).floating:
        return {"rest": kind(precision).name}
    found = {"products": kind(precision).name, "rest": dtype}
    if spec.name == "language":
        found |= {"head": "int8wo", "table": "float16" if dtype == "float32" else dtype}
    return found


def check_weights(spec: GraphSpec, weights: Iterable[Weight], promised: Mapping[str, str]) -> None:
    """Raises BuildError for a matrix whose type is not the promised one."""
    for weight in weights:
        if not weight.op or len(weight.shape) < 2:
            continue
        expected = _expected(weight, promised)
        if weight.type not in expected:
            raise BuildError(
                f"{spec.name}: {weight.name} {list(weight.shape)} is stored in {weight.type}, the manifest would say "
                f"{' or '.join(sorted(expected))}. This is a fault of the export: please report it with the checkpoint"
            )


def _expected(weight: Weight, promised: Mapping[str, str]) -> set[str]:
    if "attention" in promised:
        return {"float16", "float32"}
    name = promised.get(weight.role, promised["rest"])
    if KINDS[name].floating:
        return {name}
    divides = weight.shape[0] % BLOCK == 0 or name not in ("int4", "nvfp4")
    return {_STORED[name] if divides else "int8"}
