"""Plain meanings of precisions, against ml_dtypes and hand-computed numbers."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from mindomni_rt.benchmarks.quality.precisions import arms, of
from mindomni_rt.benchmarks.quality.rounding import FRACTION, MEANINGS, by_layer, fp4_blocks, short_sums
from mindomni_rt.checkpoint.config import published
from mindomni_rt.kernels.quantize import Rows, quantize_rows_torch
from mindomni_rt.request import Request


def test_fp4_is_that_of_ml_dtypes() -> None:
    """A block whose largest number is 6 in a tensor whose scales are exact: rounding alone is left."""
    x = torch.from_numpy(np.random.default_rng(0).uniform(-6, 6, (8, 64)).astype(np.float32))
    x[:, ::16] = 6.0
    x[0, 1:9] = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -5.0])  # halfway
    wanted = x.numpy().astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    np.testing.assert_allclose(fp4_blocks(x).numpy(), wanted, rtol=1e-6)


def test_a_block_of_zeros_stays_zero() -> None:
    assert not fp4_blocks(torch.zeros(2, 32)).any()


def test_errors_grow_with_fewer_bits() -> None:
    weight = torch.from_numpy(np.random.default_rng(1).standard_normal((64, 128)).astype(np.float32))
    errors = {k: float((w(weight) - weight).norm() / weight.norm()) for k, (w, _) in MEANINGS.items()}
    assert errors["float32"] == 0 and errors["int8wo"] == errors["int8"]
    assert errors["bfloat16"] < errors["int8"] < errors["fp8"] < errors["nvfp4"] < 0.12
    assert errors["fp8"] < errors["int4"] < 0.12


def test_every_arm_is_a_valid_request() -> None:
    for precision, options in arms().values():
        Request(prompt="x", **options)
        of(precision)


def _cut(value: Fraction, unit: Fraction) -> Fraction:
    return unit * math.trunc(value / unit)


def _power(value: Fraction) -> int:
    """The exponent of the largest power of two at or below a magnitude."""
    return math.frexp(float(abs(value)))[1] - 1


def _by_hand(a: list[float], w: list[float], promote: int | None) -> float:
    """One sum in whole fractions: 32 products and the sum so far, aligned to the largest exponent and cut off."""
    total = sums = Fraction(0)
    for at in range(0, len(a), 32):
        terms = [Fraction(x) * Fraction(y) for x, y in zip(a[at : at + 32], w[at : at + 32], strict=True)] + [sums]
        unit = Fraction(2) ** (max(_power(t) for t in terms if t) - FRACTION)
        sums = sum((_cut(t, unit) for t in terms), Fraction(0))
        sums = _cut(sums, Fraction(2) ** (_power(sums) - FRACTION)) if sums else sums
        if promote and (at + 32) % promote == 0:
            total, sums = total + sums, Fraction(0)
    return float(total + sums)


@pytest.mark.parametrize("promote", [None, 64])
def test_short_sums_are_those_of_whole_fractions(promote: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    a = quantize_rows_torch(torch.randn(3, 256, generator=generator) + 0.5, "fp8")
    w = quantize_rows_torch(torch.randn(5, 256, generator=generator), "fp8")
    found = short_sums(a, w, promote, columns=2) / (a.scale * w.scale[:, 0])
    wanted = [[_by_hand(x.tolist(), y.tolist(), promote) for y in w.values.float()] for x in a.values.float()]
    torch.testing.assert_close(found, torch.tensor(wanted), rtol=1e-6, atol=0)


def test_a_sum_that_ones_cannot_grow() -> None:
    """Beyond 2¹⁴ a fraction of 13 bits counts by twos, and ones are cut off."""
    ones = Rows(torch.ones(1, 1 << 15).to(torch.float8_e4m3fn), torch.ones(1, 1))
    assert short_sums(ones, ones).item() == 1 << 14
    assert short_sums(ones, ones, promote=128).item() == 1 << 15


def test_figures_by_layer() -> None:
    stack = replace(
        published().decoder.stack, hidden_size=192, num_heads=2, num_kv_heads=2, intermediate_size=512, num_layers=3
    )
    layers = by_layer(stack, tokens=4)
    assert len(layers) == 3
    for layer in layers:
        stream, sums = layer["stream"], layer["sums"]
        assert 0.01 < stream["fp8, float32 sums"] < 0.2
        assert all(sums["fp8"][name] <= sums["fp8fast"][name] < 0.01 for name in sums["fp8"])
        assert abs(stream["fp8fast"] - stream["fp8"]) < 0.02
    assert layers[0]["stream"]["fp8"] < layers[2]["stream"]["fp8"]


def test_stored_figures_of_fast_sums() -> None:
    """What docs/kernels.md says about fp8fast at full depth: beside what e4m3 costs, its sums cost little."""
    (path,) = (Path(__file__).parents[2] / "benchmarks" / "results").glob("*-fp8-sums.json")
    layers = json.loads(path.read_text(encoding="utf-8"))["layers"]
    assert len(layers) == published().decoder.stack.num_layers
    for layer in layers:
        stream, sums = layer["stream"], layer["sums"]
        assert abs(stream["fp8fast"] / stream["fp8, float32 sums"] - 1) < 0.025
        assert sums["fp8"]["down"] < 2.2e-4 and sums["fp8fast"]["down"] < 2.7e-3
        assert max(sums["fp8fast"][name] for name in ("qkv", "o", "gate_up")) < 1.3e-3
        assert max(sums["unsigned"].values()) < 0.13
