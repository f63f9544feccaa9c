"""8-bit and 4-bit products against their meaning in float64."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import DEVICE, EIGHT_BIT, FLOATS, FP8, FP8_SUMS, PRODUCTS, TOLERANCE, error

from mindomni_rt.benchmarks.quality.rounding import short_sums
from mindomni_rt.kernels import parts
from mindomni_rt.kernels.gemv import gemv
from mindomni_rt.kernels.int4_linear import Int4Weight, int4_linear, quantize_int4
from mindomni_rt.kernels.launch import Launch
from mindomni_rt.kernels.linear8 import BLOCK_K, linear8, quantize_weight
from mindomni_rt.kernels.quantize import Rows, quantize_rows_torch

SMALL = Launch(block_m=32, block_n=32, warps=4, stages=1)


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


@pytest.mark.parametrize("kind", EIGHT_BIT)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 5, 32), (33, 65, 160), (40, 32, 256)])
@pytest.mark.parametrize("bias", [False, True])
def test_eight_bit_products(kind, m, n, k, bias):
    a, w = quantize_rows_torch(draw(m, k), kind), quantize_weight(draw(n, k, seed=1), kind)
    b = draw(n, seed=2) if bias else None
    exact = a.dequantize(torch.float64) @ w.dequantize(torch.float64).T + (b.double() if bias else 0)
    assert error(linear8(a, w, torch.float32, b, impl="torch"), exact) < 1e-6
    assert error(linear8(a, w, torch.float32, b, impl="triton", launch=SMALL), exact) < PRODUCTS[kind]


def test_fp8_sums_in_tensor_cores():
    """What a device is asked of fp8 is what it can give, by the emulation of Ada's and Hopper's tensor cores."""
    for m, n, k in ((1, 5, 32), (33, 65, 160), (40, 32, 256), (4, 8, 3072)):
        a, w = (quantize_rows_torch(draw(rows, k, seed=rows).cpu(), "fp8") for rows in (m, n))
        exact = a.dequantize(torch.float64) @ w.dequantize(torch.float64).T
        assert 1e-6 < error(short_sums(a, w, promote=BLOCK_K), exact) < FP8_SUMS, k


@pytest.mark.parametrize("rows", [(3, 7), (1,), (20,)], ids=str)
def test_eight_bit_by_cublas(rows):
    """torch's own int8 product where it runs, the rows short of its least included."""
    a, w = quantize_rows_torch(draw(*rows, 64), "int8"), quantize_weight(draw(48, 64, seed=1), "int8")
    b = draw(48, seed=2)
    expected = linear8(a, w, torch.float32, b, impl="torch")
    assert error(linear8(a, w, torch.float32, b, impl="cublas"), expected) < 1e-6


@pytest.mark.skipif(not FP8, reason="fp8 needs SM 89")
def test_fp8_by_cublas():
    a, w = quantize_rows_torch(draw(32, 64), "fp8"), quantize_weight(draw(48, 64, seed=1), "fp8")
    found = linear8(a, w, torch.bfloat16, impl="cublas")
    assert error(found, a.dequantize() @ w.dequantize().T) < 5e-3


def test_extreme_int8_sums_are_exact():
    """127 · 127 · 4096 is beyond float32's whole numbers."""
    ones = torch.full((2, 4096), 127, dtype=torch.int8, device=DEVICE)
    odd = ones.clone()
    odd[0, 0] = 126
    one = torch.ones(2, 1, device=DEVICE)
    found = linear8(Rows(ones, one), Rows(odd, one), torch.float32, impl="triton", launch=SMALL)
    expected = torch.tensor([127 * (127 * 4096 - 1), 127 * 127 * 4096], dtype=torch.float32, device=DEVICE)
    assert torch.equal(found, expected.expand(2, 2))


def test_eight_bit_error_of_gaussians():
    """The error that 8 bits cost: about 1 % for int8 rows, 4 % for e4m3 (three bits of mantissa)."""
    x, w = draw(64, 512), draw(96, 512, seed=1)
    exact = x.double() @ w.double().T
    for kind, low, high in (("int8", 0.004, 0.02), ("fp8", 0.02, 0.06)):
        found = linear8(quantize_rows_torch(x, kind), quantize_weight(w, kind), torch.float32)
        assert low < error(found, exact) < high


def test_eight_bit_errors():
    a, w = quantize_rows_torch(draw(3, 32), "int8"), quantize_weight(draw(4, 32), "fp8")
    with pytest.raises(ValueError, match="do not fit"):
        linear8(a, w, torch.float32)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("rows", [(1,), (1, 3), (19,)], ids=str)
@pytest.mark.parametrize(("n", "k", "group"), [(7, 96, 32), (40, 384, 128)])
@pytest.mark.parametrize("bias", [False, True])
def test_four_bit_products(rows, n, k, group, dtype, bias):
    weight = quantize_int4(draw(n, k, dtype=dtype), group)
    x, b = draw(*rows, k, dtype=dtype, seed=1), draw(n, dtype=dtype, seed=2) if bias else None
    assert weight.group == group and weight.shape == (n, k)
    wide = Int4Weight(weight.packed, weight.scale.double(), weight.minimum.double())
    exact = x.double() @ wide.dequantize().T + (b.double() if bias else 0)
    assert error(int4_linear(x, weight, b, impl="triton"), exact) < TOLERANCE[dtype]
    assert error(int4_linear(x, weight, b, impl="torch"), exact) < TOLERANCE[dtype] * 3


def test_unpacking_in_parts_is_the_product(monkeypatch):
    """One part or many: the same numbers."""
    x, w, b = draw(3, 64, dtype=torch.bfloat16), draw(40, 64, dtype=torch.bfloat16), draw(40, dtype=torch.bfloat16)
    four, eight = quantize_int4(w), quantize_weight(w, "int8")
    exact = [int4_linear(x, four, b, impl="torch"), gemv(x, eight, b, impl="torch")]
    monkeypatch.setattr(parts, "UNPACKED", 64 * 8 * 7)
    for whole, found in zip(
        exact, (int4_linear(x, four, b, impl="torch"), gemv(x, eight, b, impl="torch")), strict=True
    ):
        assert error(found, whole) < 4e-3
    assert parts.unpacked_rows(64, 8) == 7 and parts.unpacked_rows(10**9, 8) == 1


def test_four_bit_packing():
    """A weight of sixteen levels comes back exactly; a gaussian one with the error of 4 bits; clipping helps."""
    levels = torch.arange(16.0, device=DEVICE).repeat(3, 8)[:, torch.randperm(128)]
    assert torch.equal(quantize_int4(levels).dequantize(), levels)
    weight = draw(64, 1024)
    packed = quantize_int4(weight)
    assert packed.packed.numel() * 2 == weight.numel() and packed.group == 128
    clipped, plain = error(packed.dequantize(), weight), error(quantize_int4(weight, clips=(1.0,)).dequantize(), weight)
    assert clipped < plain < 0.12
    assert quantize_int4(draw(4, 96)).group == 32
    for size in (24, 40):
        with pytest.raises(ValueError, match="multiple of 16"):
            quantize_int4(draw(4, size))


def test_four_bit_errors_and_prompts():
    weight = quantize_int4(draw(8, 48))
    with pytest.raises(ValueError, match="does not fit"):
        int4_linear(draw(1, 32), weight)
    with pytest.raises(ValueError, match="group 16"):
        int4_linear(draw(1, 48), weight, impl="triton")
    assert int4_linear(draw(100, 48), weight).shape == (100, 8)
