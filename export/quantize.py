"""Weights (and activations) of a graph's matrix products in 8 and 4 bits, as Q/DQ nodes for TensorRT and onnxruntime.

Rounded are the products inside the blocks (`…layers.N…`), the language model's head to 8 bits (a ninth of what decoding
reads), and its input table to 16. Norms, time and patch embeddings are small or sensitive and stay. A matrix that does
not divide into the blocks of a 4-bit type takes 8 bits. Rounding is
to nearest; activation ranges come from running the reference model on prompts (`calibrate`). The forms are those that
TensorRT-RTX 1.7 was seen to take, with weights kept compressed in the plan.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mindomni_rt.errors import BadRequestError
from mindomni_rt.memory.precision import KINDS
from mindomni_rt.model.mindomni import MindOmniModel

from .store import transposed

logger = logging.getLogger(__name__)
CALIBRATED = tuple(name for name, kind in KINDS.items() if kind.calibrated)
_INT8_MAX, _INT4_MAX, _FP8_MAX, _FP4_MAX = 127.0, 7.0, 448.0, 6.0
_INT4_BLOCKS = (128, 64, 32, 16)  # TensorRT-RTX takes these; the largest that divides the matrix is the smallest plan
_FP4_BLOCK = 16
_HEAD = re.compile(r"\.(lm_head|embed_tokens)\.weight(\.T)?$")  # one matrix where head and input table are tied
_LAYER = re.compile(r"\.layers\.\d+\..*\.weight(\.T)?$")
DEFAULT_PROMPTS = (
    "a red bicycle leaning against a yellow wall in the rain",
    "the animal that gives us wool, asleep on a green hill, oil painting",
    "(3 + 4) paper boats on a still lake at dawn",
    "what a chemist would draw for water, as a neon sign",
)


@dataclass
class QuantReport:
    """What became of a graph's products. in_8_bits: those of a 4-bit precision that do not divide into its blocks.
    error: ‖Ŵ − W‖ / ‖W‖ over all rounded products."""

    precision: str
    quantized: int = 0
    in_8_bits: int = 0
    _squares: list[tuple[float, float]] = field(default_factory=list)

    def add(self, found: NDArray[np.float32], weight: NDArray[np.float32]) -> None:
        self.quantized += 1
        delta = (found - weight).ravel()
        self._squares.append((float(delta @ delta), float(weight.ravel() @ weight.ravel())))

    @property
    def error(self) -> float:
        lost, whole = (sum(s) for s in zip(*self._squares, strict=True)) if self._squares else (0.0, 1.0)
        return float(np.sqrt(lost / whole)) if whole else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {"quantized": self.quantized, "in_8_bits": self.in_8_bits, "weight_error": round(self.error, 5)}


def quantize(model: ir.Model, precision: str, ranges: Mapping[str, float]) -> QuantReport:
    """Rewrites the products of a traced graph in place. ranges: largest magnitude at each Linear's input, by name.

    Raises BadRequestError if a calibrated precision has no range for a product.
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
        change = _int8wo if head else PASSES[precision]
        change(_Site(model, node, weight, ranges.get(name, 0.0)), report)
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
    return bool(_LAYER.search(name) or _HEAD.search(name))


def _weight(node: ir.Node) -> ir.Value | None:
    """The weight (K, N) of a product inside a block, if that is what the node is."""
    if node.op_type != "MatMul" or len(node.inputs) != 2:
        return None
    weight = node.inputs[1]
    if weight is None or weight.const_value is None:
        return None
    return weight if _rounded_name(weight) else None


class _Site:
    """One product x @ W: makes constants and nodes in front of it."""

    def __init__(self, model: ir.Model, node: ir.Node, weight: ir.Value, largest: float) -> None:
        self.model, self.node, self.weight, self.largest = model, node, weight, largest
        constant = weight.const_value
        assert constant is not None
        self.type = constant.dtype
        self.values = constant.numpy().astype(np.float32)

    def constant(self, suffix: str, array: NDArray[Any], dtype: ir.DataType) -> ir.Value:
        name = f"{self.weight.name}.{suffix}"
        graph = self.model.graph
        if name not in graph.initializers:
            tensor = ir.Tensor(array, dtype=dtype, name=name)
            graph.initializers[name] = ir.Value(
                name=name, type=ir.TensorType(dtype), shape=ir.Shape(array.shape), const_value=tensor
            )
        return graph.initializers[name]

    def scale(self, suffix: str, array: NDArray[np.float32] | np.float32) -> ir.Value:
        """A scale in the type of the model, which the dequantized numbers then have."""
        return self.constant(suffix, np.asarray(array).astype(self.type.numpy()), self.type)

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

    @property
    def x(self) -> ir.Value:
        value = self.node.inputs[0]
        assert value is not None
        return value


def _channel_scales(weight: NDArray[np.float32], largest: float) -> NDArray[np.float32]:
    return np.maximum(np.abs(weight).max(axis=0), 1e-8) / np.float32(largest)


def _int8_weight(site: _Site, report: QuantReport) -> ir.Value:
    scale = _rounded(_channel_scales(site.values, _INT8_MAX), site.type)
    q = np.clip(np.rint(site.values / scale), -_INT8_MAX, _INT8_MAX).astype(np.int8)
    report.add(q * scale, site.values)
    weight = site.constant("int8", q, ir.DataType.INT8)
    return site.insert("DequantizeLinear", [weight, site.scale("scale", scale)], axis=1)


def _int8wo(site: _Site, report: QuantReport) -> None:
    site.replace(_int8_weight(site, report))


def _int8(site: _Site, report: QuantReport) -> None:
    zero = site.constant("x_zero", np.zeros((), np.int8), ir.DataType.INT8)
    scale = site.scale("x_scale", np.float32(max(site.largest, 1e-6) / _INT8_MAX))
    x = site.insert("DequantizeLinear", [site.insert("QuantizeLinear", [site.x, scale, zero]), scale, zero])
    site.replace(_int8_weight(site, report), x)


def _fp8(site: _Site, report: QuantReport) -> None:
    kind = ir.DataType.FLOAT8E4M3FN
    zero = site.constant("x_zero", np.zeros((), ml_dtypes.float8_e4m3fn), kind)
    scale = site.scale("x_scale", np.float32(max(site.largest, 1e-6) / _FP8_MAX))
    x = site.insert("DequantizeLinear", [site.insert("QuantizeLinear", [site.x, scale, zero]), scale, zero])
    scales = _rounded(_channel_scales(site.values, _FP8_MAX), site.type)
    q = np.clip(site.values / scales, -_FP8_MAX, _FP8_MAX).astype(ml_dtypes.float8_e4m3fn)
    report.add(q.astype(np.float32) * scales, site.values)
    weight = site.constant("fp8", q, kind)
    zeros = site.constant("zero", np.zeros(scales.shape, ml_dtypes.float8_e4m3fn), kind)
    site.replace(site.insert("DequantizeLinear", [weight, site.scale("scale", scales), zeros], axis=1), x)


def _int4(site: _Site, report: QuantReport) -> None:
    inner, outer = site.values.shape
    block = next((b for b in _INT4_BLOCKS if inner % b == 0), None)
    if block is None:
        report.in_8_bits += 1
        _int8wo(site, report)
        return
    groups = site.values.reshape(inner // block, block, outer)
    scale = _rounded(np.maximum(np.abs(groups).max(axis=1), 1e-8) / np.float32(_INT4_MAX), site.type)
    q = np.clip(np.rint(groups / scale[:, None]), -_INT4_MAX - 1, _INT4_MAX)
    report.add((q * scale[:, None]).reshape(inner, outer), site.values)
    weight = site.constant("int4", q.reshape(inner, outer).astype(ml_dtypes.int4), ir.DataType.INT4)
    site.replace(site.insert("DequantizeLinear", [weight, site.scale("scale", scale)], axis=0, block_size=block))


def _nvfp4(site: _Site, report: QuantReport) -> None:
    inner, outer = site.values.shape
    if inner % _FP4_BLOCK:
        report.in_8_bits += 1
        _int8wo(site, report)
        return
    eight = ir.DataType.FLOAT8E4M3FN
    # Two levels: a float8 scale for each block of 16, one float32 scale for the tensor that brings those into range.
    top = np.float32(max(np.abs(site.values).max(), 1e-8) / (_FP8_MAX * _FP4_MAX))
    groups = site.values.reshape(inner // _FP4_BLOCK, _FP4_BLOCK, outer)
    blocks = (np.abs(groups).max(axis=1) / np.float32(_FP4_MAX) / top).astype(ml_dtypes.float8_e4m3fn)
    scale = blocks.astype(np.float32) * top
    q = np.clip(groups / np.maximum(scale, 1e-12)[:, None], -_FP4_MAX, _FP4_MAX).astype(ml_dtypes.float4_e2m1fn)
    report.add((q.astype(np.float32) * scale[:, None]).reshape(inner, outer), site.values)
    four = site.constant("fp4", q.reshape(inner, outer), ir.DataType.FLOAT4E2M1)
    level = site.insert("DequantizeLinear", [site.constant("blocks", blocks, eight), _level(site, "level", top)])
    weight = site.insert("DequantizeLinear", [four, level], axis=0, block_size=_FP4_BLOCK)

    x_top = _level(site, "x_level", np.float32(max(site.largest, 1e-6) / (_FP8_MAX * _FP4_MAX)))
    q_x, s_x = site.insert(
        "TRT_FP4DynamicQuantize",
        [site.x, x_top],
        domain="trt",
        outputs=2,
        axis=-1,
        block_size=_FP4_BLOCK,
        scale_type=17,
    )
    x_level = site.insert("DequantizeLinear", [s_x, x_top])
    x = site.insert("DequantizeLinear", [q_x, x_level], axis=-1, block_size=_FP4_BLOCK)
    site.model.opset_imports.setdefault("trt", 1)
    site.replace(weight, x)


def _level(site: _Site, suffix: str, value: np.float32) -> ir.Value:
    return site.scale(suffix, np.asarray(value, np.float32))


def _rounded(scale: NDArray[np.float32], dtype: ir.DataType) -> NDArray[np.float32]:
    """A scale as the model's type will hold it, so that weights are rounded against what will multiply them."""
    return np.maximum(scale.astype(dtype.numpy()).astype(np.float32), np.finfo(np.float16).smallest_subnormal)


PASSES = {"int8": _int8, "int8wo": _int8wo, "fp8": _fp8, "int4": _int4, "nvfp4": _nvfp4}


def calibrate(
    model: MindOmniModel,
    folder: Path,
    prompts: Sequence[str] = DEFAULT_PROMPTS,
    size: int | None = None,
    steps: int = 4,
) -> dict[str, float]:
    """The largest magnitude at the input of every Linear in the blocks, over runs of the whole pipeline on prompts.

    folder: the checkpoint, for its tokenizer. size: image side in pixels; None is the model's own, 512 at most. steps:
    of the sampler, which spread over all noise levels.
    """
    from mindomni_rt.backends.torch.backend import TorchBackend
    from mindomni_rt.pipeline import Pipeline

    pipe = Pipeline(TorchBackend(model), folder)
    height, width = (size or min(side, 512) for side in (pipe.recommended.height, pipe.recommended.width))
    with _watching(model) as ranges:
        for seed, prompt in enumerate(prompts):
            pipe.generate(
                prompt,
                height=height,
                width=width,
                num_inference_steps=steps,
                seed=seed,
                max_new_tokens=64,
                output="numpy",
            )
    return ranges


@contextmanager
def _watching(model: MindOmniModel) -> Iterator[dict[str, float]]:
    import torch

    ranges: dict[str, float] = {}

    def watch(name: str) -> Any:
        def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            ranges[name] = max(ranges.get(name, 0.0), float(inputs[0].detach().abs().max()))

        return hook

    hooks = [
        module.register_forward_pre_hook(watch(name))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and _LAYER.search(f".{name}.weight")
    ]
    try:
        yield ranges
    finally:
        for handle in hooks:
            handle.remove()


def read_prompts(path: Path) -> list[str]:
    """One prompt a line. Raises BadRequestError if there is none."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise BadRequestError(f"calibration prompts {path}: {error}") from error
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise BadRequestError(f"calibration prompts {path}: no prompt in it; expected one a line")
    return prompts
