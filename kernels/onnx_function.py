"""`mindomni::SegmentAttention` in an ONNX graph: one node, and a function whose body is standard operators.

TensorRT takes the node as a plugin (`tensorrt_plugin`); onnxruntime runs the function; TensorRT-RTX builds the graph
with the function inlined and uses its native fused attention. One file serves all three.
"""

from __future__ import annotations

import onnx.inliner
import torch
from onnx import FunctionProto, ModelProto, helper
from torch import Tensor

DOMAIN, NAME = "mindomni", "SegmentAttention"
INPUTS = ("q", "condition_k", "condition_v", "time_k", "time_v", "image_k", "image_v")
VERSION = 1
OUTPUT = "joined"


def segment_attention_node(
    q: Tensor, condition: tuple[Tensor, Tensor], time: tuple[Tensor, Tensor], image: tuple[Tensor, Tensor]
) -> Tensor:
    """The node, while torch.onnx.export traces. Shapes as in `plugin`; returns (B, N, Hq·D)."""
    batch, heads, tokens, head_dim = q.shape
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{NAME}",
        (q, *condition, *time, *image),
        dtype=q.dtype,
        shape=(batch, tokens, heads * head_dim),
        version=VERSION,
    )


def attend_by_node(
    q: Tensor, condition: tuple[Tensor, Tensor], time: tuple[Tensor, Tensor], image: tuple[Tensor, Tensor]
) -> Tensor:
    """The node with its heads apart again, (B, Hq, N, D): what a block's `attend` returns. The block joins them."""
    return segment_attention_node(q, condition, time, image).unflatten(-1, (q.shape[1], q.shape[3])).transpose(1, 2)


def function(opset: int = 24) -> FunctionProto:
    """The node in standard operators: join the segments, attend, join the heads. opset: theirs, 23 or later."""
    node = helper.make_node
    nodes = [
        node("Shape", ["q"], ["batch"], start=0, end=1),
        node("Constant", [], ["ones"], value_ints=[1, 1, 1]),
        node("Concat", ["batch", "ones"], ["rows"], axis=0),
    ]
    for side in ("k", "v"):
        nodes += [
            node("Expand", [f"condition_{side}", "rows"], [f"all_condition_{side}"]),
            node("Expand", [f"time_{side}", "rows"], [f"all_time_{side}"]),
            node("Concat", [f"all_condition_{side}", f"all_time_{side}", f"image_{side}"], [f"all_{side}"], axis=2),
        ]
    nodes += [
        node("Attention", ["q", "all_k", "all_v"], ["attended"]),
        node("Transpose", ["attended"], ["by_token"], perm=[0, 2, 1, 3]),
        node("Constant", [], ["joined_shape"], value_ints=[0, 0, -1]),
        node("Reshape", ["by_token", "joined_shape"], [OUTPUT]),
    ]
    return helper.make_function(DOMAIN, NAME, list(INPUTS), [OUTPUT], nodes, [helper.make_opsetid("", opset)])


def add_function(model: ModelProto) -> ModelProto:
    """Adds the function that defines the node to a graph, in place. Raises ValueError for a graph without the node."""
    if not any(n.domain == DOMAIN and n.op_type == NAME for n in model.graph.node):
        raise ValueError(f"the graph has no {DOMAIN}::{NAME} node")
    if not any(f.domain == DOMAIN and f.name == NAME for f in model.functions):
        opset = next(o.version for o in model.opset_import if o.domain == "")
        model.functions.append(function(opset))
    if not any(o.domain == DOMAIN for o in model.opset_import):
        model.opset_import.append(helper.make_opsetid(DOMAIN, VERSION))
    return model


def inlined(model: ModelProto) -> ModelProto:
    """The graph with the function's body in the node's place: standard operators only."""
    return onnx.inliner.inline_local_functions(model)
