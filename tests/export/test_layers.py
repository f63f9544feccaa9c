"""A trace of four layers made longer computes what the model of that many layers computes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from conftest import PARITY, relative

from mindomni_rt.bundle.contracts import GraphSpec, graph_specs, resolve
from mindomni_rt.checkpoint.config import ModelConfig
from mindomni_rt.checkpoint.layout import open_checkpoint
from mindomni_rt.export import layers
from mindomni_rt.export.graphs import wrapper_of
from mindomni_rt.export.store import WeightStore, write_graph
from mindomni_rt.export.traces import Traces, fill
from mindomni_rt.model.mindomni import MindOmniModel

LAYERS = 6
SIZES = {
    "sequence": 5,
    "capacity": 24,
    "scores": 2,
    "images": 3,
    "tokens": 7,
    "steps": 4,
    "image_tokens": 10,
    "batch": 2,
}


def deep_config() -> ModelConfig:
    config = open_checkpoint(PARITY).config
    parts = {p: getattr(config, p) for p in ("language", "connector", "decoder")}
    return replace(config, **{p: replace(c, stack=replace(c.stack, num_layers=LAYERS)) for p, c in parts.items()})


@pytest.fixture(scope="module")
def deep() -> MindOmniModel:
    """The parity model with six layers in each stack, its weights drawn."""
    with torch.device("meta"):
        model = MindOmniModel(deep_config())
    model = model.to_empty(device="cpu").eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.normal_(0, 0.2, generator=generator)
    return model


def inputs(spec: GraphSpec) -> dict[str, np.ndarray]:
    """Numbers of a contract's shapes: every layer's key-value cache and index is another."""
    draw = np.random.default_rng(0)
    found: dict[str, np.ndarray] = {}
    for tensor in spec.inputs:
        shape = tuple(resolve(axis, SIZES) for axis in tensor.axes)
        if tensor.dtype == "int64":
            found[tensor.name] = np.full(shape, 3 if tensor.name == "start" else 1, np.int64)
        elif tensor.dtype == "bool":
            found[tensor.name] = np.tril(np.ones(shape, bool))
        else:
            found[tensor.name] = draw.standard_normal(shape).astype(np.float32)
    return found


@pytest.mark.parametrize("name", ["language", "prefix", "denoiser"])
def test_a_longer_graph_is_the_model(deep: MindOmniModel, name: str, tmp_path: Path) -> None:
    assert layers.shortened(deep.config, name) != deep.config
    spec = graph_specs(deep.config)[name]
    traced, _ = Traces(deep, "float32", "fp32").get(name)
    fill(traced, deep, name)
    with WeightStore(tmp_path / "weights.data") as store:
        write_graph(traced, tmp_path / "g.onnx", store)
    onnx.checker.check_model(str(tmp_path / "g.onnx"))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(tmp_path / "g.onnx"), options, providers=["CPUExecutionProvider"])
    feed = inputs(spec)
    found = session.run([t.name for t in spec.outputs], feed)
    with torch.no_grad():
        wanted = wrapper_of(deep, name)(*(torch.from_numpy(v) for v in feed.values()))
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    for tensor, a, b in zip(spec.outputs, found, wanted, strict=True):
        assert relative(a, b.numpy()) < 1e-4, tensor.name
    attention = sum(n.op_type == "Attention" for n in onnx.load(str(tmp_path / "g.onnx")).graph.node)
    assert attention == LAYERS - (name == "prefix")


def test_short_stacks_and_unequal_layers_are_traced_whole() -> None:
    config = open_checkpoint(PARITY).config
    assert layers.shortened(config, "language") is config  # three layers
    deep = deep_config()
    for graph in ("vision", "vae", "update", "choose", "features"):
        assert layers.shortened(deep, graph) is deep and layers.layers_of(deep, graph) == 0


def test_layers_that_differ_are_an_error() -> None:
    """Layer 2 multiplies where layer 1 adds."""
    weights = [
        ir.Value(name=f"m.layers.{i}.w", shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.FLOAT)) for i in range(4)
    ]
    x = ir.Value(name="x", shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.FLOAT))
    nodes: list[ir.Node] = []
    for index, weight in enumerate(weights):
        nodes.append(ir.node("Mul" if index == 2 else "Add", [nodes[-1].outputs[0] if nodes else x, weight]))
    graph = ir.Graph([x], [nodes[-1].outputs[0]], nodes=nodes, initializers=weights, opset_imports={"": 24})
    spec = graph_specs(deep_config())["denoiser"]
    with pytest.raises(layers.UnlikeLayersError, match="layers 1 and 2 differ"):
        layers.lengthen(ir.Model(graph, ir_version=10), spec, 6)
