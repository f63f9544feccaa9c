"""The plugin against TensorRT's own Python code, `tensorrt.plugin`, without TensorRT's library and without a GPU.

The package tensorrt-cu13-bindings (PyPI, 1.3 MB) is the real extension module. It asks for eight symbols of TensorRT's
libraries, of which TensorRT for RTX exports seven; a C file of one line has the eighth. That is enough to import it and
to run every check that it makes of a plugin. It proves calls, names and signatures, not results.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import PARITY

from mindomni_rt.bundle.manifest import read_manifest

ROOT = Path(__file__).parents[2]
LINKS = {
    "libnvinfer.so.11": "libtensorrt_rtx.so.1",
    "libtensorrt_rtx.so.1": "libtensorrt_rtx.so.1",
    "libnvonnxparser.so.11": "libtensorrt_onnxparser_rtx.so.1",
    "libtensorrt_onnxparser_rtx.so.1": "libtensorrt_onnxparser_rtx.so.1",
}


def folder(module: str, variable: str = "") -> Path:
    """Where a package lies, by an environment variable or as installed; skips the test without it."""
    given = os.environ.get(variable) if variable else None
    spec = None if given else importlib.util.find_spec(module)
    if given is None and (spec is None or not spec.submodule_search_locations):
        pytest.skip(f"{module} is not installed" + (f" and {variable} names no folder with it" if variable else ""))
    return Path(given or next(iter(spec.submodule_search_locations)))  # type: ignore[union-attr, arg-type]


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which `import tensorrt` finds the bindings over stand-in libraries."""
    bindings = folder("tensorrt_bindings", "TENSORRT_BINDINGS")  # pip install tensorrt-cu13-bindings==11.4.0.106
    libraries = folder("tensorrt_rtx_libs")
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler for the stand-in of libnvinfer_plugin")
    home = tmp_path_factory.mktemp("tensorrt")
    for name, target in LINKS.items():
        (home / name).symlink_to(libraries / target)
    (home / "plugin.c").write_text("int initLibNvInferPlugins(void *logger, const char *name) { return 1; }\n")
    command = [compiler, "-shared", "-fPIC", "-o", "libnvinfer_plugin.so.11", "plugin.c"]
    subprocess.run(command, cwd=home, check=True, timeout=60)
    shutil.copytree(bindings, home / "tensorrt")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"LD_LIBRARY_PATH": str(home), "PYTHONPATH": f"{home}{os.pathsep}{ROOT}"}
    return {**environment, "TRITON_CACHE_DIR": str(home / "cache")}


def run(rig: dict[str, str], code: str) -> str:
    head = """
import tensorrt as trt, tensorrt.plugin as trtp
from mindomni_rt.kernels.tensorrt_plugin import register, PLUGIN
from mindomni_rt.kernels.plugin import INPUTS
definition = lambda: trtp.op.mindomni.SegmentAttention
def descriptions(dtype):
    shapes = [(2, 4, 16, 32)] + [(1, 2, n, 32) for n in (9, 9, 1, 1)] + [(2, 2, 16, 32)] * 2
    exprs = lambda shape: trtp.ShapeExprs.from_tuple(tuple(trtp.ShapeExpr(n) for n in shape))
    return [trtp.TensorDesc(exprs(s), dtype) for s in shapes]
"""
    done = subprocess.run(
        [sys.executable, "-c", head + code], env=rig, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return "".join(line for line in done.stdout.splitlines(True) if "[TRT]" not in line)  # its own log


def test_registration_and_autotuning(rig: dict[str, str]) -> None:
    out = run(
        rig,
        """
register(trt, trtp, 87, 32, 4, 2)
register(trt, trtp, 87, 32, 4, 2)  # a second build in the process
known = definition()
assert known.plugin_id == PLUGIN and known.num_outputs == 1 and known.input_tensor_names == list(INPUTS)
assert trt.get_plugin_registry().get_creator("SegmentAttention", "1", "mindomni") is not None
inputs = descriptions(trt.bfloat16)
(out,) = known.register_func(*inputs)
assert out.dtype == trt.bfloat16 and out.ndim == 3
(choice,) = known.autotune_func(*inputs, (out,))
for found in choice._get_combinations():
    print(sorted({t.name for t in found.types}), len(found.types), {f.name for f in found.layouts})
try:
    register(trt, trtp, 90, 32, 4, 2)
except ValueError as error:
    print("refused:", error)
""",
    )
    lines = out.splitlines()
    assert lines[:2] == ["['HALF'] 8 {'LINEAR'}", "['BF16'] 8 {'LINEAR'}"]
    assert lines[2].startswith("refused:") and "process of its own" in lines[2]


@pytest.mark.compile
def test_the_ahead_of_time_implementation(rig: dict[str, str]) -> None:
    """Its types are the ones that TensorRT asks for, and its numbers are TensorRT's symbols."""
    out = run(
        rig,
        """
register(trt, trtp, 87, 32, 4, 2)
known = definition()
inputs = descriptions(trt.bfloat16)
outputs = known.register_func(*inputs)
name, ptx, launch, extra = known.aot_impl_func(*inputs, outputs, 0)
assert isinstance(name, str) and f".entry {name}" in ptx
assert isinstance(launch, trtp.KernelLaunchParams) and isinstance(extra, trtp.SymExprs) and len(extra) == 3
assert all(isinstance(value, trtp.SymInt32) for value in extra)
for field in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared_mem"):
    assert isinstance(getattr(launch, field)(), trt.ISymExpr), field
print("ok")
""",
    )
    assert out == "ok\n"


@pytest.mark.compile
@pytest.mark.parametrize("sm", ["sm_80", "sm_87", "sm_90", "sm_110"])
def test_a_bundle_for_tensorrt(
    rig: dict[str, str], sm: str, bundles: Callable[[str], Path], export_cache: Path, tmp_path: Path
) -> None:
    """`export build` makes every call of TensorRT's Python interface that a bundle takes, up to the serialisation. The
    library behind is that for RTX: whether it gives an engine for such a GPU varies from run to run, and it names no
    reason where it gives none; then the advice is ours."""
    bundles("fp16")  # its traces are kept
    command = ["-m", "mindomni_rt", "export", "build", str(PARITY), "--target", sm, "--precision", "fp16", "--out"]
    environment = {**rig, "XDG_CACHE_HOME": str(export_cache.parent)}
    done = subprocess.run(
        [sys.executable, *command, str(tmp_path / "b")], env=environment, capture_output=True, text=True, timeout=240
    )
    assert "graph 10 of 10, vae_encode" in done.stderr and "Traceback" not in done.stderr, done.stderr[-2000:]
    if done.returncode == 0:
        made = read_manifest(tmp_path / "b")
        assert (made.runtime, made.targets, made.runtime_version) == ("tensorrt", (sm,), "11.4.0.106")
        assert all(graph.file.endswith(".plan") for graph in made.graphs.values())
    else:
        advice = f"no engine for {sm}. TensorRT: gave no reason. Usual causes: no GPU on this machine"
        assert done.returncode == 2 and advice in done.stderr.splitlines()[-1] and not (tmp_path / "b").exists()
