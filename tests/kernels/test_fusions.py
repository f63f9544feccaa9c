"""Norm, rotary embedding, gate and 8-bit rows against their meaning in float64."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import DEVICE, EIGHT_BIT, FLOATS, TOLERANCE, convert, error

from mindomni_rt.kernels.norms import add_norm
from mindomni_rt.kernels.quantize import LARGEST, quantize_rows, quantize_rows_torch
from mindomni_rt.kernels.rope import rope, split_heads
from mindomni_rt.kernels.swiglu import swiglu


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(1, 48), (3, 5, 100), (2, 3072)], ids=str)
@pytest.mark.parametrize("residual", [False, True])
def test_norm(shape, residual, dtype):
    x, r, w = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=1), draw(shape[-1], dtype=dtype, seed=2)
    y, total = add_norm(x, w, 1e-5, r if residual else None, impl="triton")
    expected = (x + r).double() if residual else x.double()
    # The interpreter casts to bfloat16 by cutting off, a GPU rounds.
    assert error(total, expected) <= (TOLERANCE[dtype] if dtype == torch.bfloat16 and DEVICE == "cpu" else 0)
    expected = total.double()
    exact = expected / (expected.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w.double()
    assert error(y, exact) < TOLERANCE[dtype]
    assert residual or total is x


@pytest.mark.parametrize("kind", EIGHT_BIT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_eight_bit_rows(kind, dtype):
    x = draw(2, 5, 100, dtype=dtype)
    x[0, 1] = 0
    x[1, 2] *= 1e4
    found, expected = quantize_rows(x, kind, impl="triton"), quantize_rows_torch(x, kind)
    torch.testing.assert_close(found.scale, expected.scale, rtol=1e-6, atol=0)
    assert (found.values.float() - expected.values.float()).abs().max() <= (1 if kind == "int8" else 32)
    assert (found.values.float() != expected.values.float()).float().mean() < 0.01  # ties only
    step = 0.5 / LARGEST[kind] if kind == "int8" else 2.0**-4
    bound = x.double().abs() * 2**-4 + x.double().abs().amax(-1, keepdim=True) * (step if kind == "int8" else 1e-5)
    assert ((found.dequantize().double() - x.double()).abs() <= bound * 1.001).all()
    assert (found.dequantize()[0, 1] == 0).all()
    with pytest.raises(ValueError, match="int8 or fp8"):
        quantize_rows(x, "int4")


@pytest.mark.parametrize("kind", EIGHT_BIT)
def test_norm_and_gate_into_eight_bits(kind):
    x, r, w = draw(7, 80), draw(7, 80, seed=1), draw(80, seed=2)
    for found, expected in (
        (add_norm(x, w, 1e-6, r, kind, impl="triton")[0], add_norm(x, w, 1e-6, r, impl="torch")[0]),
        (swiglu(x, kind, impl="triton"), swiglu(x, impl="torch")),
    ):
        exact = quantize_rows_torch(expected, kind)
        assert error(found.dequantize(), exact.dequantize()) < 5e-3
        assert error(found.dequantize(), expected) < (0.02 if kind == "int8" else 0.04)
    for function in (lambda: add_norm(x, w, 1e-6, quantize="int3"), lambda: swiglu(x, "int3")):
        with pytest.raises(ValueError, match="int8, fp8 or None"):
            function()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(1, 2), (3, 70), (2, 3, 5000)], ids=str)
def test_gate(shape, dtype):
    x = draw(*shape, dtype=dtype) * 4
    gate, up = x.double().chunk(2, dim=-1)
    assert error(swiglu(x, impl="triton"), gate * torch.sigmoid(gate) * up) < TOLERANCE[dtype]


def turned(x, cos, sin):
    """Rotation as complex numbers: another way to the same."""
    half = x.shape[-1] // 2
    z = torch.complex(x[..., :half], x[..., half:]) * torch.complex(cos, sin)
    return torch.cat([z.real, z.imag], dim=-1)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 96), (7, 1, 128), (3, 3, 10)])
@pytest.mark.parametrize("per_row", [False, True])
def test_rope_in_place(heads, kv_heads, head_dim, per_row, dtype):
    x = draw(2, 5, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    angle = torch.rand(*((2,) if per_row else ()), 5, head_dim // 2, device=DEVICE) * 6
    cos, sin = angle.cos().contiguous(), angle.sin().contiguous()
    tables = [t.double().unsqueeze(-3) for t in (cos, sin)]
    q, k, v = split_heads(x.double(), heads, kv_heads)
    expected = turned(q, *tables), turned(k, *tables), v
    for impl in ("torch", "triton"):
        found = rope(x.clone(), cos, sin, heads, kv_heads, impl=impl)
        for a, b in zip(found, expected, strict=True):
            assert error(a, b) < TOLERANCE[dtype] * (2 if impl == "torch" else 1)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("start", [0, 3, 6])
def test_rope_into_a_cache(start, impl):
    heads, kv_heads, head_dim, tokens, capacity = 6, 2, 16, 3, 9
    x = draw(1, tokens, (heads + 2 * kv_heads) * head_dim)
    angle = torch.rand(capacity, head_dim // 2, device=DEVICE) * 6
    caches = draw(3, 2, 1, kv_heads, capacity, head_dim)
    keys, values = caches[1, 0], caches[1, 1]
    before = caches.clone()
    tables = [t[start : start + tokens].double() for t in (angle.cos(), angle.sin())]
    q, k, v = split_heads(x.double(), heads, kv_heads)
    place = torch.tensor([start], dtype=torch.int32, device=DEVICE)
    found = rope(x.clone(), angle.cos(), angle.sin(), heads, kv_heads, (keys, values), place, impl=impl)
    assert error(found[0], turned(q, *tables)) < 1e-6
    assert found[1] is keys and found[2] is values
    slots = slice(start, start + tokens)
    assert error(keys[:, :, slots], turned(k, *tables)) < 1e-6
    assert error(values[:, :, slots], v) < 1e-6
    before[1, 0][:, :, slots], before[1, 1][:, :, slots] = keys[:, :, slots], values[:, :, slots]
    assert torch.equal(before, caches)  # nothing else was written
    with pytest.raises(ValueError, match="belong together"):
        rope(x, angle.cos(), angle.sin(), heads, kv_heads, start=place)


def test_conversion_helper_keeps_integers():
    assert convert((torch.ones(2, dtype=torch.int32),), torch.float16)[0].dtype == torch.int32
