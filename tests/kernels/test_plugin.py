"""The kernel image for engines: arguments, launch expressions, PTX; and the node's meaning in an ONNX graph."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from kernel_checks import DEVICE, FLOATS, TOLERANCE, error

from mindomni_rt.kernels.expressions import CeilDiv, Dim, Mul, build, evaluate, from_data, to_data
from mindomni_rt.kernels.launch import Launch, for_sm, split_head
from mindomni_rt.kernels.plugin import (
    INPUTS,
    LAUNCHES,
    PTX,
    Image,
    grid,
    launch_numbers,
    plugin_kernel,
    spec,
    strip_hidden,
)
from mindomni_rt.kernels.segment_attention import LOG2_E, segment_attention_torch
from mindomni_rt.kernels.triton_compat import triton

ROOT = Path(__file__).parents[2]
SMALL = Launch(block_m=32, block_n=32, warps=4, stages=1)


def tensors(batch, heads, kv_heads, tokens, length, head_dim, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    shapes = (
        [(batch, heads, tokens)] + [(1, kv_heads, n) for n in (length, length, 1, 1)] + [(batch, kv_heads, tokens)] * 2
    )
    drawn = [torch.randn(*s, head_dim, generator=g).to(DEVICE, dtype) for s in shapes]
    return dict(zip(INPUTS, drawn, strict=True))


def meaning(t):
    out = segment_attention_torch(
        t["q"],
        (t["condition_k"], t["condition_v"]),
        (t["time_k"][:, :, 0], t["time_v"][:, :, 0]),
        (t["image_k"], t["image_v"]),
    )
    return out.transpose(1, 2).flatten(2)


def example(head_dim=96, heads=4, sm=87):
    x, y = grid(heads, for_sm(LAUNCHES, sm))
    return Image(sm=sm, dtype="bf16", entry="e", ptx="", threads=256, shared=0, grid_x=x, grid_y=y)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("batch", "heads", "kv_heads"), [(1, 2, 2), (3, 4, 2)])
def test_launched_by_its_own_expressions(batch, heads, kv_heads, dtype):
    """Grid and integers come from the expressions, as an engine would take them."""
    t = tensors(batch, heads, kv_heads, 37, 21, 96, dtype)
    shapes = {name: tuple(x.shape) for name, x in t.items()}
    x, y = grid(heads, SMALL)
    made = Image(sm=0, dtype="", entry="", ptx="", threads=128, shared=0, grid_x=x, grid_y=y)
    numbers = launch_numbers(made, shapes)
    out = torch.empty(batch, 37, heads * 96, dtype=dtype, device=DEVICE)
    d0, d1 = split_head(96)
    plugin_kernel[numbers["grid"]](
        *t.values(), *numbers["extra"], out, SCALE=96**-0.5 * LOG2_E, HEADS=heads, GROUP=heads // kv_heads,
        D0=d0, D1=d1, BM=32, BN=32, UPCAST=dtype == torch.bfloat16 and DEVICE == "cpu",
    )  # fmt: skip
    assert error(out, meaning({k: v.double() for k, v in t.items()})) < TOLERANCE[dtype]


@pytest.mark.parametrize("tokens", [1, 127, 128, 129, 4096])
@pytest.mark.parametrize("batch", [1, 2])
def test_expressions_give_the_launchers_numbers(tokens, batch):
    shapes = dict.fromkeys(INPUTS, (batch, 4, tokens, 96)) | {"condition_k": (1, 4, 300, 96)}
    for sm in (80, 87, 90, 110, 120):
        launch = for_sm(LAUNCHES, sm)
        numbers = launch_numbers(example(sm=sm), shapes)
        assert numbers["grid"] == (triton.cdiv(tokens, launch.block_m), batch * 4)  # as segment_attention launches
        assert numbers["extra"] == [batch, tokens, 300]


def test_expressions_are_plain_data():
    expression = CeilDiv(Mul(Dim("q", 2), 3), Dim("image_k", 1))
    data = json.loads(json.dumps(to_data(expression)))
    assert data == {"cdiv": [{"mul": [{"dim": ["q", 2]}, 3]}, {"dim": ["image_k", 1]}]}
    assert from_data(data) == expression
    assert evaluate(expression, {"q": (0, 0, 7), "image_k": (0, 4)}) == 6
    text = build(expression, lambda name, axis: Text(f"{name}.{axis}"), lambda a, b: Text(f"cdiv({a}, {b})"))
    assert text == "cdiv((q.2 * 3), image_k.1)"
    for wrong in ("q", {"add": [1, 2]}, {"mul": [1]}, True, {"dim": ["q", 0], "mul": [1, 2]}):
        with pytest.raises(ValueError, match="launch expression"):
            from_data(wrong)
    described = json.loads(json.dumps(example().describe()))
    assert [from_data(axis) for axis in described["grid"][:2]] == list(grid(4, for_sm(LAUNCHES, 87)))


class Text(str):
    """A symbolic number, written down."""

    def __mul__(self, other):
        return Text(f"({self} * {other})")


def test_hidden_parameters_are_taken_away():
    parameters = ",\n".join(f"\t.param .u64 f_param_{i}" for i in range(3))
    ptx = f".visible .entry f(\n{parameters}\n)\n{{ld [f_param_0];}}"
    assert "f_param_2" not in strip_hidden(ptx, "f", 2)
    assert strip_hidden(ptx, "f", 2).count("param_1") == 1
    with pytest.raises(ValueError, match="reads f_param_0"):
        strip_hidden(ptx, "f", 0)
    with pytest.raises(ValueError, match="no entry"):
        strip_hidden(ptx, "g", 2)
    with pytest.raises(ValueError, match="head_dim 20"):
        spec(90, "bf16", 20, 2, 2)


@pytest.mark.compile
def test_images_for_the_sms_of_tensorrt(tmp_path):
    """Orin, Ada, Hopper, data centre's Blackwell, Thor: PTX whose entry takes exactly what an engine passes."""
    code = """
import json, sys
from kernels.plugin import image
for sm in (80, 87, 89, 90, 100, 110):
    made = image(sm, "bf16", 96, 32, 32)
    open(f"{sys.argv[1]}/{sm}.ptx", "w").write(made.ptx)
    print(json.dumps(made.describe()))
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    for line in done.stdout.splitlines():
        described = json.loads(line)
        sm = described["sm"]
        assert described["shared"] <= 48 << 10 and described["block"] == [32 * for_sm(LAUNCHES, sm).warps, 1, 1]
        ptx = (tmp_path / f"{sm}.ptx").read_text()
        assert f".version {PTX[max(k for k in PTX if k <= sm)] / 10}" in ptx
        header = ptx[ptx.index(".entry") : ptx.index(")", ptx.index(".entry"))]
        assert header.count(".param") == len(INPUTS) + len(described["extra"]) + 1
        kinds = [line.split()[1] for line in header.splitlines() if ".param" in line]
        assert kinds == [".u64"] * 7 + [".u32"] * 3 + [".u64"]  # inputs, integers, output
        tool = tools / ("ptxas-blackwell" if sm >= 100 else "ptxas")
        architecture = next(line.split()[1] for line in ptx.splitlines() if line.startswith(".target"))
        assembled = subprocess.run(
            [
                str(tool),
                f"-arch={architecture.rstrip(',')}",
                str(tmp_path / f"{sm}.ptx"),
                "-o",
                str(tmp_path / "a.cubin"),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        assert assembled.returncode == 0, assembled.stderr


# ONNX


class Attend(torch.nn.Module):
    """A graph with the node between other operators, as a block has it."""

    def __init__(self) -> None:
        super().__init__()
        self.o = torch.nn.Linear(2 * 32, 16)

    def forward(self, q, condition_k, condition_v, time_k, time_v, image_k, image_v):
        from mindomni_rt.kernels.onnx_function import attend_by_node

        pair = (condition_k, condition_v), (time_k, time_v), (image_k, image_v)
        if torch.onnx.is_in_onnx_export():
            return self.o(attend_by_node(q * 2, *pair).transpose(1, 2).flatten(2))  # as Attention.forward joins
        values = (q * 2, condition_k, condition_v, time_k, time_v, image_k, image_v)
        return self.o(meaning(dict(zip(INPUTS, values, strict=True))))


@pytest.fixture(scope="module")
def exported():
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    module, t = Attend().eval(), {k: v.cpu() for k, v in tensors(2, 2, 1, 6, 5, 32).items()}
    batch, tokens, length = (torch.export.Dim(n, min=1) for n in ("batch", "tokens", "length"))
    axes = {name: {} for name in INPUTS} | {key: {2: length} for key in ("condition_k", "condition_v")}
    axes |= {key: {0: batch, 2: tokens} for key in ("q", "image_k", "image_v")}
    program = torch.onnx.export(
        module, tuple(t.values()), dynamo=True, dynamic_shapes=tuple(axes.values()), opset_version=24,
        input_names=list(INPUTS), verbose=False,
    )  # fmt: skip
    return module, program.model_proto


def run(model, t):
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {k: v.numpy() for k, v in t.items()})[0]


@pytest.mark.parametrize(("batch", "tokens", "length"), [(2, 6, 5), (1, 3, 9), (3, 1, 1)])
def test_the_function_means_what_the_kernel_does(exported, batch, tokens, length):
    import onnx

    from mindomni_rt.kernels.onnx_function import DOMAIN, add_function, inlined

    module, traced = exported
    model = onnx.ModelProto()
    model.CopyFrom(traced)
    assert [n.op_type for n in model.graph.node if n.domain == DOMAIN] == ["SegmentAttention"]
    add_function(add_function(model))  # twice is once
    assert len(model.functions) == 1
    onnx.checker.check_model(model)
    plain = inlined(model)
    assert not plain.functions and not [n for n in plain.graph.node if n.domain == DOMAIN]
    assert [n.op_type for n in plain.graph.node].count("Attention") == 1
    t = {k: v.cpu() for k, v in tensors(batch, 2, 1, tokens, length, 32).items()}
    with torch.no_grad():
        expected = module(*t.values()).numpy()
    found, other = run(model, t), run(plain, t)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(other, found, rtol=1e-6, atol=1e-7)


def test_a_graph_without_the_node():
    from onnx import helper

    from mindomni_rt.kernels.onnx_function import add_function

    graph = helper.make_graph([], "empty", [], [])
    with pytest.raises(ValueError, match="no mindomni::SegmentAttention"):
        add_function(helper.make_model(graph))
