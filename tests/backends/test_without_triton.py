"""The fast path where triton is not installed (Windows, CPU builds): the kernels' reference implementations run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from conftest import PARITY

ROOT = Path(__file__).parents[2]
CODE = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] == "triton" else find(name, *rest)
import mindomni_rt, torch
from mindomni_rt.kernels import segment_attention as attention, triton_compat as compat
assert not compat.HAS_TRITON
pipe = mindomni_rt.load(sys.argv[1], device="cpu", fast=True)
result = pipe.generate("two cats", height=32, width=32, num_inference_steps=2, max_new_tokens=3, output="numpy")
assert result.images.shape == (1, 32, 32, 3)
x = torch.zeros(1, 1, 2, 96)
try:
    attention.segment_attention(x, (x, x), impl="triton")
except ValueError as error:
    assert "not installed" in str(error)
else:
    raise AssertionError("forcing triton must fail")
"""


def test_reference_implementations_run() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(PARITY)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
