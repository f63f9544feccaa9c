"""What the kernel tests share. Import it before any kernel: without a GPU they run under Triton's interpreter, which
has to be chosen before triton is imported, because its own library functions are decorated then."""

from __future__ import annotations

import importlib.util
import os
import sys

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("the kernels need triton", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    assert "triton" not in sys.modules, "triton was imported before its interpreter was chosen: set TRITON_INTERPRET=1"
    os.environ["TRITON_INTERPRET"] = "1"

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
# Relative error ‖a − b‖/‖b‖ against float64 on the same rounded inputs.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
FP8 = DEVICE == "cpu" or torch.cuda.get_device_capability() >= (8, 9)
EIGHT_BIT = ["int8", pytest.param("fp8", marks=pytest.mark.skipif(not FP8, reason="fp8 needs SM 89"))]
FP8_SUMS = 5e-4
"""Relative error of float32 sums of fp8 products by tensor cores, which keep 13 bits of a sum's fraction."""
PRODUCTS = {"int8": 1e-6, "fp8": 1e-6 if DEVICE == "cpu" else FP8_SUMS}


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """‖found − expected‖ / ‖expected‖ in float64."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm())


def convert(x, dtype):
    """Floating tensors of nested tuples and dictionaries in dtype; everything on the device under test."""
    if isinstance(x, dict):
        return {k: convert(v, dtype) for k, v in x.items()}
    if isinstance(x, tuple):
        return tuple(convert(v, dtype) for v in x)
    if torch.is_tensor(x):
        return x.to(DEVICE, dtype) if x.is_floating_point() else x.to(DEVICE)
    return x
