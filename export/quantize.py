"""Weights (and activations) of a graph's matrix products in 8 and 4 bits, as Q/DQ nodes for TensorRT and onnxruntime.

Rounded are the products inside the blocks (`…layers.N…`), the language model's head to 8 bits (a ninth of what decoding
reads), and its input table to 16. Norms, time and patch embeddings are small or sensitive and stay. A matrix that does
not divide into the blocks of a 4-bit type takes 8 bits. Numbers are made in `rounding`, ranges of activations in
`calibrate`. The forms are those that TensorRT-RTX 1.7 was seen to take, with weights kept compressed in the plan.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mindomni_rt.errors import BadRequestError
from mindomni_rt.memory.precision import KINDS

from .rounding import (
    FP4_BLOCK,
    FP4_MAX,
    FP8_MAX,
    INT8_MAX,
    WeightRounder,
    to_fp8,
    to_int4,
    to_int8,
    to_nvfp4,
    to_packed,
)
from .store import WeightStore, transposed
from .weights import MICROSOFT

logger = logging.getLogger(__name__)
CALIBRATED = tuple(name for name, kind in KINDS.items() if kind.calibrated)
_INT4_BLOCKS = (128, 64, 32, 16)  # TensorRT-RTX takes these; the largest that divides the matrix is the smallest plan
_IN_INT8 = 4  # MatMulNBits' accuracy_level: blocks of the input are rounded to int8 as they come
_HEAD = re.compile(r"\.(lm_head|embed_tokens)\.weight(\.T)?$")  # one matrix where head and input table are tied
LAYER = re.compile(r"\.layers\.\d+\..*\.weight(\.T)?$")


@dataclass
class QuantReport:
    """What became of a graph's products. in_8_bits: those of a 4-bit precision that do not divide into its blocks.
    error: ‖Ŵ − W‖ / ‖W‖ over all rounded products."""

    precision: str
    quantized: int = 0
    in_8_bits: int = 0
    _squares: list[tuple[float, float]] = field(default_factory=list)

    def add(self, squares: tuple[float, float]) -> None:
        """Counts a rounded product. squares: the sums of (Ŵ − W)² and of W²."""
        self.quantized += 1
        self._squares.append(squares)

    @property
    def error(self) -> float:
        lost, whole = (sum(s) for s in zip(*self._squares, strict=True)) if self._squares else (0.0, 1.0)
        return float(np.sqrt(lost / whole)) if whole else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {"quantized": self.quantized, "in_8_bits": self.in_8_bits, "weight_error": round(self.error, 5)}


def quantize(
    model: ir.Model, precision: str, ranges: Mapping[str, float], store: WeightStore, *, packed: bool = False
) -> QuantReport:
    """Rewrites the products of a traced graph in place. ranges: largest magnitude at each Linear's input, by name.
    packed: write products of weight-only precisions as onnxruntime's MatMulNBits, which starts and runs faster there
    than DequantizeLinear and MatMul; TensorRT has no such operator.

    Rounded weights go into the store one by one, so that no more than one matrix is in memory; one that an earlier
    graph of the store rounded is taken from there. Raises BadRequestError if a calibrated precision has no range for
    a product.
    """
    report = QuantReport(precision)
    gemm_to_matmul(model)
    for node in list(model.graph):
        weight = _weight(node)
        if weight is None:
            continue
        name = re.sub(r"\.weight(\.T)?$", "", weight.name or "")
        head = bool(_HEAD.search(f".{name}.weight"))
        if precision in CALIBRATED and name not in ranges and not head:
            raise BadRequestError(f"no calibration range for {name}; calibrate with prompts that reach it")
        passes = {**PASSES, **_PACKED} if packed else PASSES
        change = passes["int8wo" if head else precision]
        change(_Site(model, node, weight, ranges.get(name, 0.0), store), report)
    _halve_tables(model)
    assert report.quantized, f"{precision}: no product of the graph was found to quantize"
    if report.in_8_bits:
        logger.warning("%s: %d products take 8 bits, being indivisible into blocks", precision, report.in_8_bits)
    return report


def gemm_to_matmul(model: ir.Model) -> None:
    """Rewrites each Gemm over a matrix that is to be rounded as MatMul (and Add for its bias).

    A Linear over rows of a 2-D tensor is traced as Gemm, with its weight the other way round (transB).
    """
    for node in list(model.graph):
        weight = node.inputs[1] if node.op_type == "Gemm" else None
        if weight is None or weight.const_value is None or not _rounded_name(weight):
            continue
        alpha, beta = (node.attributes[n].as_float() if n in node.attributes else 1.0 for n in ("alpha", "beta"))
        assert alpha == beta == 1.0, f"{weight.name}: Gemm with alpha {alpha}, beta {beta}"
        trans_a, trans_b = (n in node.attributes and node.attributes[n].as_int() for n in ("transA", "transB"))
        x, bias = node.inputs[0], node.inputs[2] if len(node.inputs) > 2 else None
        nodes = []
        if trans_a:
            nodes.append(ir.node("Transpose", [x], {"perm": [1, 0]}))
            x = nodes[-1].outputs[0]
        nodes.append(ir.node("MatMul", [x, transposed(model.graph, weight) if trans_b else weight]))
        if bias is not None:
            nodes.append(ir.node("Add", [nodes[-1].outputs[0], bias]))
        out = nodes[-1].outputs[0]
        out.shape, out.type = node.outputs[0].shape, node.outputs[0].type
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], nodes, node.outputs, [out])
        if not weight.uses():
            del model.graph.initializers[str(weight.name)]


def _halve_tables(model: ir.Model) -> None:
    """Stores the input table of a graph that computes in float32 in float16; rows are widened after they are taken."""
    for node in list(model.graph):
        table = node.inputs[0] if node.op_type == "Gather" else None
        if table is None or table.const_value is None or len(table.const_value.shape) != 2:
            continue
        if table.const_value.dtype != ir.DataType.FLOAT or ".embed_tokens." not in f".{table.name}":
            continue
        half = table.const_value.numpy().astype(np.float16)
        name = f"{table.name}.fp16"
        small = ir.Value(
            name=name,
            type=ir.TensorType(ir.DataType.FLOAT16),
            shape=ir.Shape(half.shape),
            const_value=ir.Tensor(half, dtype=ir.DataType.FLOAT16, name=name),
        )
        small = model.graph.initializers.setdefault(name, small)
        taken, out = ir.node("Gather", [small, node.inputs[1]], dict(node.attributes)), node.outputs[0]
        wide = ir.node("Cast", [taken.outputs[0]], {"to": ir.DataType.FLOAT})
        wide.outputs[0].shape, wide.outputs[0].type = out.shape, out.type
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], [taken, wide], node.outputs, wide.outputs)
        if not table.uses():
            del model.graph.initializers[str(table.name)]


def _rounded_name(weight: ir.Value) -> bool:
    name = f".{weight.name or ''}"
    return bool(LAYER.search(name) or _HEAD.search(name))


def _weight(node: ir.Node) -> ir.Value | None:
    """The weight (K, N) of a product inside a block, if that is what the node is."""
    if node.op_type != "MatMul" or len(node.inputs) != 2:
        return None
    weight = node.inputs[1]
    if weight is None or weight.const_value is None:
        return None
    return weight if _rounded_name(weight) else None


@dataclass(frozen=True)
class _Made:
    """Constants that a weight was rounded to, by suffix, and the sums of squares of its error and of itself."""

    tensors: Mapping[str, ir.TensorProtocol]
    squares: tuple[float, float]


class _Site:
    """One product x @ W: makes constants and nodes in front of it."""

    def __init__(self, model: ir.Model, node: ir.Node, weight: ir.Value, largest: float, store: WeightStore) -> None:
        self.model, self.node, self.weight, self.largest, self.store = model, node, weight, largest, store
        constant = weight.const_value
        assert constant is not None
        self.type = constant.dtype
        inner, outer = constant.shape.numpy()
        self.inner, self.outer = int(inner), int(outer)

    def rounded(self, kind: str, make: Callable[[WeightRounder], None], report: QuantReport) -> dict[str, ir.Value]:
        """The constants of the weight, made once for all graphs of the store."""
        key = (kind, self.weight.name, self.type)
        if key not in self.store.made:
            constant = self.weight.const_value
            assert constant is not None
            rounder = WeightRounder(constant.numpy().astype(np.float32, copy=False), self.type)
            make(rounder)
            tensors = {
                suffix: self.store.tensor(f"{self.weight.name}.{suffix}", tensor)
                for suffix, tensor in rounder.tensors.items()
            }
            self.store.made[key] = _Made(tensors, rounder.squares)
        made: _Made = self.store.made[key]
        report.add(made.squares)
        return {suffix: self._value(suffix, tensor) for suffix, tensor in made.tensors.items()}

    def _value(self, suffix: str, tensor: ir.TensorProtocol) -> ir.Value:
        name, graph = f"{self.weight.name}.{suffix}", self.model.graph
        if name not in graph.initializers:
            graph.initializers[name] = ir.Value(
                name=name,
                type=ir.TensorType(tensor.dtype),
                shape=ir.Shape(tensor.shape.numpy()),
                const_value=tensor,
            )
        return graph.initializers[name]

    def constant(self, suffix: str, array: NDArray[Any], dtype: ir.DataType) -> ir.Value:
        return self._value(suffix, ir.Tensor(array, dtype=dtype, name=f"{self.weight.name}.{suffix}"))

    def scale(self, suffix: str, value: float | np.float32) -> ir.Value:
        """A scale in the type of the model, which the dequantized numbers then have."""
        return self.constant(suffix, np.asarray(value, np.float32).astype(self.type.numpy()), self.type)

    def insert(self, op: str, inputs: Sequence[ir.Value], domain: str = "", outputs: int = 1, **attributes: Any) -> Any:
        node = ir.node(op, inputs, attributes or None, domain=domain, num_outputs=outputs)
        self.model.graph.insert_before(self.node, node)
        return node.outputs[0] if outputs == 1 else node.outputs

    def replace(self, weight: ir.Value, x: ir.Value | None = None) -> None:
        self.node.replace_input_with(1, weight)
        if x is not None:
            self.node.replace_input_with(0, x)
        if not self.weight.uses():
            assert self.weight.name is not None
            del self.model.graph.initializers[self.weight.name]

    def multiply(self, op: str, weights: Sequence[ir.Value], domain: str, **attributes: Any) -> None:
        """Puts another operator of x and these constants in the product's place."""
        graph, old = self.model.graph, self.node.outputs[0]
        node = ir.node(op, [self.x, *weights], attributes, domain=domain)
        node.outputs[0].shape, node.outputs[0].type = old.shape, old.type
        ir.convenience.replace_nodes_and_values(graph, self.node, [self.node], [node], [old], node.outputs)
        if not self.weight.uses():
            del graph.initializers[str(self.weight.name)]
        self.model.opset_imports.setdefault(domain, 1)

    @property
    def x(self) -> ir.Value:
        value = self.node.inputs[0]
        assert value is not None
        return value


def _int8_weight(site: _Site, report: QuantReport) -> ir.Value:
    made = site.rounded("int8", to_int8, report)
    return site.insert("DequantizeLinear", [made["int8"], made["scale"]], axis=1)


def _int8wo(site: _Site, report: QuantReport) -> None:
    site.replace(_int8_weight(site, report))


def _quantized_x(site: _Site, zero: NDArray[Any], dtype: ir.DataType, most: float) -> ir.Value:
    """The product's input, rounded with its calibrated range and widened again."""
    start = site.constant("x_zero", zero, dtype)
    scale = site.scale("x_scale", np.float32(max(site.largest, 1e-6) / most))
    x = site.insert("QuantizeLinear", [site.x, scale, start])
    return site.insert("DequantizeLinear", [x, scale, start])  # type: ignore[no-any-return]


def _int8(site: _Site, report: QuantReport) -> None:
    x = _quantized_x(site, np.zeros((), np.int8), ir.DataType.INT8, INT8_MAX)
    site.replace(_int8_weight(site, report), x)


def _fp8(site: _Site, report: QuantReport) -> None:
    x = _quantized_x(site, np.zeros((), ml_dtypes.float8_e4m3fn), ir.DataType.FLOAT8E4M3FN, FP8_MAX)
    made = site.rounded("fp8", to_fp8, report)
    site.replace(site.insert("DequantizeLinear", [made["fp8"], made["scale"], made["zero"]], axis=1), x)


def _int4(site: _Site, report: QuantReport) -> None:
    block = next((b for b in _INT4_BLOCKS if site.inner % b == 0), None)
    if block is None:
        report.in_8_bits += 1
        _int8wo(site, report)
        return
    made = site.rounded("int4", lambda rounder: to_int4(rounder, block), report)
    site.replace(site.insert("DequantizeLinear", [made["int4"], made["scale"]], axis=0, block_size=block))


def _nvfp4(site: _Site, report: QuantReport) -> None:
    if site.inner % FP4_BLOCK:
        report.in_8_bits += 1
        _int8wo(site, report)
        return
    made = site.rounded("nvfp4", to_nvfp4, report)
    level = site.insert("DequantizeLinear", [made["blocks"], made["level"]])
    weight = site.insert("DequantizeLinear", [made["fp4"], level], axis=0, block_size=FP4_BLOCK)

    x_top = site.scale("x_level", np.float32(max(site.largest, 1e-6) / (FP8_MAX * FP4_MAX)))
    q_x, s_x = site.insert(
        "TRT_FP4DynamicQuantize",
        [site.x, x_top],
        domain="trt",
        outputs=2,
        axis=-1,
        block_size=FP4_BLOCK,
        scale_type=17,
    )
    x_level = site.insert("DequantizeLinear", [s_x, x_top])
    x = site.insert("DequantizeLinear", [q_x, x_level], axis=-1, block_size=FP4_BLOCK)
    site.model.opset_imports.setdefault("trt", 1)
    site.replace(weight, x)


def _pack(site: _Site, report: QuantReport, bits: int) -> None:
    block = next((b for b in _INT4_BLOCKS if site.inner % b == 0), None)
    if block is None:
        report.in_8_bits += bits == 4
        _int8wo(site, report)
        return
    made = site.rounded(f"packed{bits}", lambda rounder: to_packed(rounder, bits, block), report)
    site.multiply(
        "MatMulNBits",
        [made[f"int{bits}"], made["scale"]],
        domain=MICROSOFT,
        K=site.inner,
        N=site.outer,
        bits=bits,
        block_size=block,
        accuracy_level=_IN_INT8,
    )


Pass = Callable[[_Site, QuantReport], None]
_PACKED: dict[str, Pass] = {"int4": partial(_pack, bits=4), "int8wo": partial(_pack, bits=8)}
PASSES: dict[str, Pass] = {"int8": _int8, "int8wo": _int8wo, "fp8": _fp8, "int4": _int4, "nvfp4": _nvfp4}
