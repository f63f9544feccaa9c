"""Many rows times int8 weights, in tiles, against float64; and wide tiles over 4-bit weights."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import DEVICE, FLOATS, TOLERANCE, error

from mindomni_rt.kernels.int4_linear import WIDE, int4_linear, quantize_int4
from mindomni_rt.kernels.int8_linear import int8_linear
from mindomni_rt.kernels.launch import Launch
from mindomni_rt.kernels.linear8 import quantize_weight

SMALL = Launch(block_m=32, block_n=32, warps=4, stages=2)


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("n", "k"), [(7, 96), (40, 128)])
@pytest.mark.parametrize("bias", [False, True])
def test_many_rows_of_int8(n, k, bias, dtype):
    weight = quantize_weight(draw(n, k, dtype=dtype), "int8")
    x, b = draw(2, 35, k, dtype=dtype, seed=1), draw(n, dtype=dtype, seed=2) if bias else None
    exact = x.double() @ (weight.values.double() * weight.scale.double()).T + (b.double() if bias else 0)
    found = int8_linear(x, weight, b, impl="triton", launch=SMALL)
    assert found.shape == (2, 35, n) and error(found, exact) < TOLERANCE[dtype]
    assert error(int8_linear(x, weight, b, impl="torch"), exact) < TOLERANCE[dtype] * 3
    assert error(int8_linear(x[:1, :1], weight, b, impl="triton"), exact[:1, :1]) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_many_rows_of_int4(dtype):
    weight = quantize_int4(draw(40, 256, dtype=dtype), 128)
    x = draw(70, 256, dtype=dtype, seed=1)
    exact = x.double() @ weight.dequantize().double().T
    assert error(int4_linear(x, weight, impl="triton", launch=WIDE[80]), exact) < TOLERANCE[dtype] * 3
