"""Building for the CPU where triton is not installed: CPU builds of PyTorch bring none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mindomni_rt.errors import UnsupportedDeviceError
from mindomni_rt.export.targets import parse_target

ROOT = Path(__file__).parents[2]
CODE = """
import sys
sys.modules["triton"] = None
import mindomni_rt.export.build
from mindomni_rt.kernels.onnx_function import function
assert [n.op_type for n in function().node].count("Attention") == 1
"""


def test_the_builder_imports_without_triton() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


ENGINE = """
import sys
sys.modules["triton"] = None
from mindomni_rt.errors import MissingExtraError
from mindomni_rt.export.engines import _register
try:
    _register(None, None, {"heads": 8, "head_dim": 64}, ["sm_87"])
except MissingExtraError as error:
    print(error)
"""


def test_our_attention_in_an_engine_names_triton() -> None:
    done = subprocess.run([sys.executable, "-c", ENGINE], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(
        "triton is not installed: --attention triton compiles our kernel with it: pip install "
    )


def test_cpu_is_not_combined() -> None:
    with pytest.raises(UnsupportedDeviceError, match="cpu cannot be combined"):
        parse_target("cpu,sm_89")
