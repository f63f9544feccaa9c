"""norm_gemv against its three steps in float64."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import DEVICE, FLOATS, TOLERANCE, error

from mindomni_rt.kernels.linear8 import quantize_weight
from mindomni_rt.kernels.norm_gemv import norm_gemv


def exact(x, weight, norm, eps, residual, bias, gate):
    total = x.double() + (0 if residual is None else residual.double())
    normed = total / (total.square().mean(-1, keepdim=True) + eps).sqrt() * norm.double()
    out = normed @ weight.double().T + (0 if bias is None else bias.double())
    if gate:
        first, second = out.chunk(2, -1)
        out = first * torch.sigmoid(first) * second
    return out, total


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(
    ("n", "k", "gate", "bias"), [(10, 100, False, True), (14, 1030, True, False), (3, 16, False, False)]
)
def test_one_row(n, k, gate, bias, residual, impl, dtype):
    g = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=g).to(DEVICE, dtype)

    x, r, norm, weight = draw(1, 1, k), draw(1, 1, k) if residual else None, draw(k), draw(n, k)
    b = draw(n) if bias else None
    y, total = norm_gemv(x, weight, norm, 1e-5, r, b, gate, impl=impl)
    expected, exact_total = exact(x, weight, norm, 1e-5, r, b, gate)
    assert y.shape == (1, 1, n // 2 if gate else n)
    # The plain meaning rounds the normed row to 16 bits, the kernel does not.
    assert error(y, expected) < TOLERANCE[dtype] * 6
    assert error(total, exact_total) < TOLERANCE[dtype]
    assert residual or total.data_ptr() == x.data_ptr()


@pytest.mark.parametrize("gate", [False, True])
def test_int8_weights(gate):
    g = torch.Generator().manual_seed(0)
    x, r, norm = (torch.randn(1, 96, generator=g).to(DEVICE) for _ in range(3))
    weight = quantize_weight(torch.randn(20, 96, generator=g).to(DEVICE), "int8")
    expected, _ = exact(x, weight.dequantize(), norm[0], 1e-6, r, None, gate)
    for impl in ("torch", "triton"):
        assert error(norm_gemv(x, weight, norm[0], 1e-6, r, None, gate, impl=impl)[0], expected) < 3e-6


def test_errors():
    x, weight = torch.randn(2, 8, device=DEVICE), torch.randn(4, 8, device=DEVICE)
    assert norm_gemv(x, weight, x[0], 1e-6)[0].shape == (2, 4)
    with pytest.raises(ValueError, match="2 rows"):
        norm_gemv(x, weight, x[0], 1e-6, impl="triton")
    with pytest.raises(ValueError, match="no bias"):
        norm_gemv(x, weight, x[0], 1e-6, bias=x[0, :4], gate=True)
