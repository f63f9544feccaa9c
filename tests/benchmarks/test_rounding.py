"""Plain meanings of precisions, against ml_dtypes and hand-computed numbers."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import torch

from mindomni_rt.benchmarks.quality.precisions import arms, of
from mindomni_rt.benchmarks.quality.rounding import MEANINGS, fp4_blocks
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
