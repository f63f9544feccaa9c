"""What a bundle promises is what its graphs hold: read from the files by onnx, apart from the code that wrote them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import PARITY
from onnx import TensorProto, helper, numpy_helper

from mindomni_rt.bundle.contracts import graph_specs
from mindomni_rt.bundle.manifest import read_manifest
from mindomni_rt.export.store import WeightStore
from mindomni_rt.export.weights import BuildError, bytes_by_type, check_weights, promise, read_weights

FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16}
TYPES = {"int8": "int8", "int8wo": "uint8 of 8 bits", "int4": "uint8 of 4 bits", "fp32": "float", "fp16": "float16"}


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int8wo", "int4"])
def test_types_of_weights(bundles: Callable[[str], Path], precision: str) -> None:
    bundle = bundles(precision)
    manifest = read_manifest(bundle)
    for name, entry in manifest.graphs.items():
        graph = onnx.load(str(bundle / f"{name}.onnx")).graph
        tensors = graph.initializer
        rounded = name in ("language", "prefix", "denoiser", "denoiser_first") and precision not in ("fp32", "fp16")
        packed = {n.input[1]: n for n in graph.node if n.op_type == "MatMulNBits"}
        large = {
            t.name: stored_type(t, packed)
            for t in tensors
            if len(t.dims) == 2 + (t.name in packed) and ".scale" not in t.name
        }
        blocks = [kind for n, kind in large.items() if ".layers." in n or n.startswith("connector.")]
        if name in ("language", "denoiser", "prefix", "connector"):
            assert blocks
        assert set(blocks) <= {TYPES[precision] if rounded else TYPES["fp16" if precision == "fp16" else "fp32"]}
        if name == "language" and rounded:
            head = [kind for n, kind in large.items() if "lm_head" in n]
            table = [kind for n, kind in large.items() if "embed_tokens" in n]
            assert head == [TYPES["int8wo"]] and table == ["float16"]
            assert entry.report["weights"] == {
                "products": precision, "head": "int8wo", "table": "float16", "rest": "float32",
            }  # fmt: skip
        assert sum(entry.report["bytes_by_type"].values()) == sum(
            int(np.prod(t.dims, dtype=np.int64)) * numpy_helper.to_array(t).itemsize for t in tensors
        ) + sum(_constants(bundle / f"{name}.onnx"))
    assert {manifest.graphs[n].report["weights"]["rest"] for n in ("vision", "connector")} <= {"float32", "float16"}


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_no_tensor_stands_twice(bundles: Callable[[str], Path], precision: str) -> None:
    """Graphs that read the same numbers read the same place of one file."""
    places: dict[bytes, set[tuple[str, str]]] = {}
    for path in bundles(precision).glob("*.onnx"):
        for tensor in onnx.load(str(path), load_external_data=False).graph.initializer:
            at = {e.key: e.value for e in tensor.external_data}
            if at:
                data = (path.parent / at["location"]).read_bytes()
                part = data[int(at["offset"]) : int(at["offset"]) + int(at["length"])]
                places.setdefault(part, set()).add((at["location"], at["offset"]))
            else:
                assert len(tensor.raw_data) <= 1024
    assert len(places) > 50 and all(len(found) == 1 for found in places.values())


def stored_type(tensor: TensorProto, packed: dict[str, onnx.NodeProto]) -> str:
    """A tensor's type in words; of one that MatMulNBits reads with the bits of a number, if its bytes are that many."""
    kind = TensorProto.DataType.Name(tensor.data_type).lower()
    if tensor.name not in packed:
        return kind
    found = {a.name: a.i for a in packed[tensor.name].attribute}
    blocks = found["K"] // found["block_size"]
    assert list(tensor.dims) == [found["N"], blocks, found["block_size"] * found["bits"] // 8]
    return f"{kind} of {found['bits']} bits"


def _constants(path: Path) -> list[int]:
    nodes = onnx.load(str(path)).graph.node
    return [
        numpy_helper.to_array(a.t).nbytes
        for n in nodes
        if n.op_type == "Constant"
        for a in n.attribute
        if a.HasField("t")
    ]


def linear(op: str, name: str, data_type: int, tmp_path: Path, **attributes: int) -> Path:
    """A graph of one product over a stored matrix."""
    weight = helper.make_tensor(
        name, data_type, [32, 32], bytes(32 * 32 * 4 if data_type == 1 else 32 * 32 * 2), raw=True
    )
    inputs = [name, "x"] if op == "Gather" else ["x", name]
    node = helper.make_node(op, inputs, ["y"], **attributes)
    x = helper.make_tensor_value_info("x", TensorProto.INT64 if op == "Gather" else data_type, [2, 32])
    y = helper.make_tensor_value_info("y", data_type, None)
    path = tmp_path / "g.onnx"
    onnx.save(helper.make_model(helper.make_graph([node], "g", [x], [y], [weight])), str(path))
    return path


@pytest.mark.parametrize("op", ["MatMul", "Gemm", "Gather", "Einsum"])
def test_a_matrix_that_was_forgotten_is_an_error(op: str, tmp_path: Path) -> None:
    """Whatever the node type and the name: only listed small matrices may stay in the compute type."""
    from mindomni_rt.checkpoint.config import published

    spec = graph_specs(published())["language"]
    more = {"equation": "ij,kj->ik"} if op == "Einsum" else {}
    promised = promise(spec, "int4", "float32")
    for name in ("language.lm_head.weight", "language.layers.0.mlp.up_proj.weight.T", "val_17"):
        found = read_weights(linear(op, name, TensorProto.FLOAT, tmp_path, **more))  # type: ignore[arg-type]
        assert bytes_by_type(found) == {"float32": 4096}
        with pytest.raises(BuildError, match=r"is stored in float32, the manifest would say"):
            check_weights(spec, found, promised)
    table = read_weights(linear("Gather", "language.embed_tokens.weight", TensorProto.FLOAT16, tmp_path))
    check_weights(spec, table, promised)
    with pytest.raises(BuildError):
        check_weights(spec, table, promise(spec, "fp32", "float32"))


@pytest.mark.parametrize(("trans_a", "trans_b", "bias"), [(0, 0, False), (0, 1, True), (1, 0, True), (1, 1, False)])
def test_gemm_is_rounded_like_matmul(trans_a: int, trans_b: int, bias: bool, tmp_path: Path) -> None:
    """onnx's own evaluator before and after: the same numbers up to the rounding, and no float matrix left."""
    import onnx_ir as ir
    from onnx.reference import ReferenceEvaluator

    from mindomni_rt.export.quantize import quantize

    draw = np.random.default_rng(0)
    weight = draw.standard_normal((24, 16) if trans_b else (16, 24)).astype(np.float32)
    x = draw.standard_normal((16, 5) if trans_a else (5, 16)).astype(np.float32)
    tensors = [numpy_helper.from_array(weight, "language.lm_head.weight")]
    tensors += [numpy_helper.from_array(draw.standard_normal(24).astype(np.float32), "bias")] if bias else []
    node = helper.make_node("Gemm", ["x", *(t.name for t in tensors)], ["y"], transA=trans_a, transB=trans_b)
    ends = (helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", x.shape), ("y", (5, 24))))
    first, last = ends
    model = helper.make_model(
        helper.make_graph([node], "g", [first], [last], tensors), opset_imports=[helper.make_opsetid("", 21)]
    )
    wanted = ReferenceEvaluator(model).run(None, {"x": x})[0]
    changed = ir.from_proto(model)
    with WeightStore(tmp_path / "weights.data") as store:
        quantize(changed, "int4", {}, store)
    found = ReferenceEvaluator(ir.to_proto(changed)).run(None, {"x": x})[0]
    assert [v.name for v in changed.graph.outputs] == ["y"] and "Gemm" not in {n.op_type for n in changed.graph}
    assert {v.const_value.dtype for v in changed.graph.initializers.values() if len(v.shape) == 2} == {ir.DataType.INT8}
    assert 1e-5 < np.abs(found - wanted).max() < 0.05 * np.abs(wanted).max()


@pytest.mark.parametrize(("precision", "bits"), [("int4", 4), ("int8wo", 8)])
def test_packed_products_are_the_rounded_matrix(precision: str, bits: int, tmp_path: Path) -> None:
    """MatMulNBits' bytes read by hand are the matrix within half a step, and onnxruntime multiplies by that matrix."""
    import onnx_ir as ir
    import onnxruntime

    from mindomni_rt.export.quantize import quantize
    from mindomni_rt.export.store import write_graph

    draw = np.random.default_rng(0)
    weight, x = draw.standard_normal((64, 24)).astype(np.float32), draw.standard_normal((3, 64)).astype(np.float32)
    tensor = numpy_helper.from_array(weight, "language.layers.0.mlp.up_proj.weight")
    node = helper.make_node("MatMul", ["x", tensor.name], ["y"])
    ends = (helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", x.shape), ("y", (3, 24))))
    first, last = ends
    made = helper.make_model(helper.make_graph([node], "g", [first], [last], [tensor]), ir_version=10)
    changed = ir.from_proto(made)
    with WeightStore(tmp_path / "weights.data") as store:
        report = quantize(changed, precision, {}, store, packed=True)
        write_graph(changed, tmp_path / "g.onnx", store)
    graph = onnx.load(str(tmp_path / "g.onnx")).graph
    tensors = {t.name.rpartition(".")[2]: numpy_helper.to_array(t) for t in graph.initializer}
    numbers, scales = tensors[f"int{bits}"], tensors["scale"]
    if bits == 4:
        numbers = np.stack([numbers & 15, numbers >> 4], axis=-1)
    rounded = (numbers.reshape(24, -1, 64).astype(np.float32) - 2 ** (bits - 1)) * scales[..., None]
    assert scales.shape == (24, 1) and (np.abs(rounded[:, 0] - weight.T) <= scales * 0.501).all()
    error = np.linalg.norm(rounded[:, 0] - weight.T) / np.linalg.norm(weight)
    assert report.error == pytest.approx(error, rel=1e-3)
    session = onnxruntime.InferenceSession(str(tmp_path / "g.onnx"), providers=["CPUExecutionProvider"])
    found, wanted = session.run(None, {"x": x})[0], x @ rounded[:, 0].T
    assert np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 0.01  # the input in 8 bits


def test_int4_for_tensorrt_is_rounded_in_groups_of_rows(tmp_path: Path) -> None:
    import onnx_ir as ir

    from mindomni_rt.export.quantize import quantize
    from mindomni_rt.export.store import write_graph

    weight = np.random.default_rng(0).standard_normal((256, 25)).astype(np.float32)
    tensor = numpy_helper.from_array(weight, "language.layers.0.mlp.up_proj.weight")
    node = helper.make_node("MatMul", ["x", tensor.name], ["y"])
    first, last = (helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", [3, 256]), ("y", [3, 25])))
    made = helper.make_model(helper.make_graph([node], "g", [first], [last], [tensor]), ir_version=10)
    changed = ir.from_proto(made)
    with WeightStore(tmp_path / "weights.data") as store:
        quantize(changed, "int4", {}, store)
        write_graph(changed, tmp_path / "g.onnx", store)
    graph = onnx.load(str(tmp_path / "g.onnx")).graph
    (widen,) = [n for n in graph.node if n.op_type == "DequantizeLinear"]
    assert {a.name: a.i for a in widen.attribute} == {"axis": 0, "block_size": 128}
    tensors = {t.name.rpartition(".")[2]: numpy_helper.to_array(t) for t in graph.initializer}
    numbers, scales = tensors["int4"].astype(np.float32).reshape(2, 128, 25), tensors["scale"]
    groups = weight.reshape(2, 128, 25)
    np.testing.assert_allclose(scales, np.abs(groups).max(axis=1) / 7, rtol=1e-6)
    assert (np.abs(numbers * scales[:, None] - groups) <= scales[:, None] * 0.5001).all()


def test_a_connector_with_grouped_keys_is_traced(tmp_path: Path) -> None:
    import dataclasses

    import onnxruntime

    from mindomni_rt.export.store import write_graph
    from mindomni_rt.export.traces import Traces, fill
    from mindomni_rt.model.connector import Connector
    from mindomni_rt.model.mindomni import load_model

    model, _ = load_model(PARITY, torch.float32)
    before = model.config.connector
    stack = dataclasses.replace(before.stack, num_heads=before.stack.num_heads, num_kv_heads=1)
    config = dataclasses.replace(before, stack=stack)
    assert stack.num_heads > 1
    model.config = dataclasses.replace(model.config, connector=config)
    model.connector = Connector(config).eval().requires_grad_(False)
    with WeightStore(tmp_path / "connector.data") as store:
        traced, _ = Traces(model, "float32", "fp32").get("connector")
        fill(traced, model, "connector")
        file = tmp_path / "connector.onnx"
        write_graph(traced, file, store)
    hidden = np.random.default_rng(0).standard_normal((1, 9, config.input_size)).astype(np.float32)
    angles = np.linspace(0, 1, 9 * stack.head_dim // 2).reshape(9, -1).astype(np.float32)
    tables = np.cos(angles), np.sin(angles)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    found = session.run(None, dict(zip(("hidden", "cos", "sin"), (hidden, *tables), strict=True)))[0]
    wanted = model.connector(*map(torch.from_numpy, (hidden, *tables))).numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)
