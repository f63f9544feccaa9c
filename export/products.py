"""Forms of a rounded matrix product, compared by onnxruntime on the machine at hand.

The products of the published language model's layers in each form, run in turn: other work slows all of them alike.

    mindomni export products --layers 1 --out result.json

forms: float32; DequantizeLinear before MatMul in int4 and int8 ("dq"); MatMulNBits ("packed"), also with its weights
packed for the processor on disk ("saved"); int8 with the input rounded by a fixed range ("static") or by its own
("dynamic"); and torch in bfloat16 where it is installed.
"""

from __future__ import annotations

import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from mindomni_rt.checkpoint.config import published
from mindomni_rt.memory.host import cpu_threads
from mindomni_rt.outputs import write_json

from .weights import MICROSOFT

FORMS = (
    "fp32",
    "int4 dq",
    "int4 packed",
    "int4 packed saved",
    "int8wo dq",
    "int8wo packed",
    "int8 static",
    "int8 dynamic",
)
_OWN = ("int4 packed saved", "int8 dynamic")
ROWS = (1, 64)  # a token; a prompt
_BLOCK, _STEP = 128, np.float32(0.002)


def compare(
    layers: int, rounds: int, folder: Path | None = None, providers: Sequence[str] = ("CPUExecutionProvider",)
) -> dict[str, Any]:
    """Seconds (median of `rounds`) and ratios to the first provider's float32 of each form, and what loading takes."""
    stack = published().language.stack
    hidden, inner = stack.hidden_size, stack.intermediate_size
    width = stack.num_kv_heads * stack.head_dim
    shapes = [(hidden, hidden), (hidden, width), (hidden, width), (hidden, hidden), (hidden, inner), (hidden, inner)]
    shapes = [*shapes, (inner, hidden)] * layers
    runs: dict[str, Callable[[int], object]] = {}
    loads: dict[str, float] = {}
    lacks: dict[str, str] = {}
    disk: dict[str, int] = {}
    with tempfile.TemporaryDirectory(dir=folder) as name:
        for form in FORMS:
            path = Path(name) / f"{form.replace(' ', '-')}.onnx"
            _write(form.removesuffix(" saved"), shapes, path)
            if form.endswith(" saved"):
                path = _saved(path, providers[0])
            disk[form] = sum(p.stat().st_size for p in Path(name).glob(f"{path.stem}.*"))
            for provider in providers:
                label = form if provider == providers[0] else f"{form}, {provider.removesuffix('ExecutionProvider')}"
                if form in _OWN and provider != "CPUExecutionProvider":
                    lacks[label] = "operators of the CPU provider: OpenVINO's, of onnxruntime 1.24.1, crashes on them"
                    continue
                began = time.perf_counter()
                try:
                    runs[label] = _session(path, shapes, provider)
                except Exception as error:  # noqa: BLE001  onnxruntime's errors share no base; a lack is a result, too
                    lacks[label] = str(error).splitlines()[0][:200]
                    continue
                loads[label] = time.perf_counter() - began
        torch_run = _torch(shapes)
        if torch_run is not None:
            runs["torch bf16"] = torch_run
        times = {form: {rows: _times(run, rows) for rows in ROWS} for form, run in runs.items()}
        for _ in range(rounds - 1):
            for form, run in runs.items():
                for rows in ROWS:
                    times[form][rows] += _times(run, rows)
    medians = {form: {rows: statistics.median(t) for rows, t in found.items()} for form, found in times.items()}
    return {
        "layers": layers,
        "rounds": rounds,
        "providers": list(providers),
        "threads": cpu_threads(),
        "machine": f"{platform.machine()}, {platform.processor() or _cpu()}",
        "refused": lacks,
        "bytes": disk,
        "load_seconds": {form: round(seconds, 3) for form, seconds in loads.items()},
        "seconds": {form: {str(rows): round(t, 5) for rows, t in found.items()} for form, found in medians.items()},
        "times_fp32": {
            form: {str(rows): round(medians["fp32"][rows] / t, 2) for rows, t in found.items()}
            for form, found in medians.items()
        },
    }


def _cpu() -> str:
    found = [line for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if "model name" in line]
    return found[0].partition(":")[2].strip() if found else ""


def _times(run: Callable[[int], object], rows: int) -> list[float]:
    began = time.perf_counter()
    run(rows)
    return [time.perf_counter() - began]


def _saved(path: Path, provider: str) -> Path:
    """The graph as onnxruntime rearranged it, its weights packed for this processor, written beside it."""
    import onnxruntime

    out = path.with_name(f"{path.stem}-saved.onnx")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(out), 4
    for key, value in {
        "session.save_external_prepacked_constant_initializers": "1",
        "session.optimized_model_external_initializers_file_name": f"{out.stem}.data",
        "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
    }.items():
        options.add_session_config_entry(key, value)
    onnxruntime.InferenceSession(str(path), options, providers=[provider])
    return out


def _session(path: Path, shapes: list[tuple[int, int]], provider: str) -> Callable[[int], object]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = cpu_threads(), 4
    if path.stem.endswith("-saved"):
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    more = {"num_of_threads": str(cpu_threads())} if provider.startswith("OpenVINO") else {}
    session = onnxruntime.InferenceSession(str(path), options, providers=[(provider, more)])
    draw = np.random.default_rng(0)
    inputs = {
        rows: {f"x{k}": draw.standard_normal((rows, k)).astype(np.float32) for k in {k for k, _ in shapes}}
        for rows in ROWS
    }
    session.run(None, inputs[1])
    return lambda rows: session.run(None, inputs[rows])


def _torch(shapes: list[tuple[int, int]]) -> Callable[[int], object] | None:
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(cpu_threads())
    weights = [torch.randn(n, k, dtype=torch.bfloat16) for k, n in shapes]

    def run(rows: int) -> None:
        for weight in weights:
            torch.nn.functional.linear(torch.ones(rows, weight.shape[1], dtype=torch.bfloat16), weight)

    run(1)
    return run


def _write(form: str, shapes: list[tuple[int, int]], path: Path) -> None:
    """Products over weights of a form side by side, each reduced to one number, so that outputs cost nothing."""
    draw = np.random.default_rng(0)
    nodes: list[NodeProto] = []
    tensors: list[TensorProto] = [numpy_helper.from_array(np.array([0, 1], np.int64), "axes")]
    for index, (k, n) in enumerate(shapes):
        made, weights = _product(form, f"x{k}", index, k, n, draw)
        nodes += made
        nodes.append(helper.make_node("ReduceMax", [f"y{index}", "axes"], [f"out{index}"], keepdims=0))
        tensors += weights
    ins = [
        helper.make_tensor_value_info(f"x{k}", TensorProto.FLOAT, ["rows", k]) for k in sorted({k for k, _ in shapes})
    ]
    outs = [helper.make_tensor_value_info(f"out{i}", TensorProto.FLOAT, []) for i in range(len(shapes))]
    model = helper.make_model(
        helper.make_graph(nodes, "products", ins, outs, tensors),
        opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)],
        ir_version=10,
    )
    onnx.save(model, str(path), save_as_external_data=True, location=f"{path.stem}.data", size_threshold=1024)


def _product(
    form: str, x: str, index: int, k: int, n: int, draw: np.random.Generator
) -> tuple[list[NodeProto], list[TensorProto]]:
    w, y, s, b = f"w{index}", f"y{index}", f"s{index}", f"b{index}"
    if form == "fp32":
        return [helper.make_node("MatMul", [x, w], [y])], [_tensor(w, draw.standard_normal((k, n), np.float32))]
    if form.endswith("packed"):
        bits = 4 if form.startswith("int4") else 8
        numbers = draw.integers(0, 256, (n, k // _BLOCK, _BLOCK * bits // 8), np.uint8)
        more: dict[str, Any] = {"K": k, "N": n, "bits": bits, "block_size": _BLOCK, "accuracy_level": 4}
        node = helper.make_node("MatMulNBits", [x, b, s], [y], domain=MICROSOFT, **more)
        return [node], [_tensor(b, numbers), _tensor(s, np.full((n, k // _BLOCK), _STEP))]
    multiply = helper.make_node("MatMul", [x, w], [y])
    if form == "int4 dq":
        raw = draw.integers(0, 256, k * n // 2, np.uint8).tobytes()
        node = helper.make_node("DequantizeLinear", [b, s], [w], axis=0, block_size=_BLOCK)
        scales = _tensor(s, np.full((k // _BLOCK, n), _STEP))
        return [node, multiply], [helper.make_tensor(b, TensorProto.INT4, [k, n], raw, raw=True), scales]
    weights = [_tensor(b, draw.integers(-127, 128, (k, n), np.int8)), _tensor(s, np.full(n, _STEP))]
    if form == "int8 dynamic":
        return [helper.make_node("DynamicQuantizeMatMul", [x, b, s], [y], domain=MICROSOFT)], weights
    widen = helper.make_node("DequantizeLinear", [b, s], [w], axis=1)
    if form == "int8wo dq":
        return [widen, multiply], weights
    weights += [_tensor(f"xs{index}", np.float32(0.03)), _tensor(f"xz{index}", np.int8(0))]
    ends = [f"xs{index}", f"xz{index}"]
    narrow = helper.make_node("QuantizeLinear", [x, *ends], [f"xq{index}"])
    back = helper.make_node("DequantizeLinear", [f"xq{index}", *ends], [f"xd{index}"])
    return [narrow, back, widen, helper.make_node("MatMul", [f"xd{index}", w], [y])], weights


def _tensor(name: str, array: NDArray[Any] | np.generic) -> TensorProto:
    return numpy_helper.from_array(np.asarray(array), name)


def record(found: dict[str, Any], path: Path) -> None:
    """Writes a comparison as JSON with date and versions."""
    import onnxruntime

    versions = {"onnxruntime": onnxruntime.__version__, "numpy": np.__version__}
    data = {"what": "forms of rounded products", "date": time.strftime("%Y-%m-%d"), "versions": versions, **found}
    write_json(path, data)


def table(found: dict[str, Any]) -> str:
    """A comparison as aligned text."""
    lines = [f"{'form':24} {'load s':>7} " + " ".join(f"{f'{rows} rows, s':>12} {'x fp32':>7}" for rows in ROWS)]
    for form, times in found["seconds"].items():
        cells = " ".join(f"{times[str(r)]:12.4f} {found['times_fp32'][form][str(r)]:7.2f}" for r in ROWS)
        lines.append(f"{form:24} {found['load_seconds'].get(form, 0.0):7.2f} {cells}")
    return "\n".join(lines)
