"""gemv against float64."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import DEVICE, FLOATS, TOLERANCE, error

from mindomni_rt.kernels.gemv import gemv
from mindomni_rt.kernels.linear8 import quantize_weight


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("n", "k"), [(1, 8), (7, 100), (33, 2050)])
@pytest.mark.parametrize("bias", [False, True])
def test_one_row(n, k, bias, dtype):
    g = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(*s, generator=g).to(DEVICE, dtype) for s in ((1, 1, k), (n, k), (n,)))
    exact = x.double() @ w.double().T + (b.double() if bias else 0)
    found = gemv(x, w, b if bias else None, impl="triton")
    assert found.shape == (1, 1, n) and error(found, exact) < TOLERANCE[dtype]


def test_more_rows_go_to_the_library():
    x, w = torch.randn(3, 16, device=DEVICE), torch.randn(5, 16, device=DEVICE)
    torch.testing.assert_close(gemv(x, w), x @ w.T)
    with pytest.raises(ValueError, match="3 rows"):
        gemv(x, w, impl="triton")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
def test_int8_weight_only(rows, bias):
    g = torch.Generator().manual_seed(0)
    x, b = torch.randn(rows, 100, generator=g).to(DEVICE), torch.randn(37, generator=g).to(DEVICE)
    weight = quantize_weight(torch.randn(37, 100, generator=g).to(DEVICE), "int8")
    exact = x.double() @ weight.dequantize(torch.float64).T + (b.double() if bias else 0)
    found = gemv(x, weight, b if bias else None, impl="triton" if rows == 1 else "auto")
    assert error(found, exact) < 1e-6
