"""int8_attention against exact attention in float64, and against its own roundings in plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import convert, error
from kernels_cases import attention_case

from mindomni_rt.kernels.int8_attention import int8_attention, int8_attention_torch
from mindomni_rt.kernels.launch import Launch
from mindomni_rt.kernels.segment_attention import segment_attention_torch

SMALL = Launch(block_m=32, block_n=32, warps=4, stages=1)


@pytest.mark.parametrize("pv", ["fp8", "16bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("queries", "lengths", "head_dim", "heads", "kv_heads"),
    [(65, [33, 7], 96, 2, 2), (33, [20], 64, 4, 2), (17, [0, 40], 128, 1, 1)],
)
def test_error_and_meaning(queries, lengths, head_dim, heads, kv_heads, dtype, pv):
    arguments = attention_case(queries, queries, 40, lengths, head_dim, heads, kv_heads)
    rounded = convert(arguments, dtype)
    exact = segment_attention_torch(**convert(rounded, torch.float64))
    found = int8_attention(**rounded, pv=pv, impl="triton", launch=SMALL)
    assert error(found, exact) < (0.05 if pv == "fp8" else 0.02)
    meaning = int8_attention_torch(**rounded, pv=pv)
    assert error(meaning, exact) < (0.05 if pv == "fp8" else 0.02)
    # P's rounding differs: the kernel rounds it against a running maximum.
    assert error(found, meaning) < (0.03 if pv == "fp8" else 2e-3)


def test_the_mean_of_the_keys_is_taken_away():
    """Keys that share a large vector: int8 alone would round their differences away."""
    arguments = attention_case(40, 40, 24, [24, 11], 96, 2, 2)
    for name in ("image", "condition", "time"):
        k, v = arguments[name]
        arguments[name] = (k + 40, v)
    arguments["q"] /= 4
    exact = segment_attention_torch(**arguments)
    found = int8_attention(**convert(arguments, torch.float32), pv="16bit", impl="triton", launch=SMALL)
    assert error(found, exact) < 0.03


def test_images_share_a_prefix_and_strides():
    g = torch.Generator().manual_seed(3)
    fused = torch.randn(4, 33, 3 * 2 * 96, generator=g)
    q, k, v = (t.unflatten(-1, (2, 96)).transpose(1, 2) for t in fused.chunk(3, dim=-1))
    cache, time = torch.randn(2, 2, 2, 30, 96, generator=g), torch.randn(2, 2, 2, 96, generator=g)
    arguments = dict(
        q=q, condition=(cache[0], cache[1]), time=(time[0], time[1]), image=(k, v),
        lengths=torch.tensor([30, 9], dtype=torch.int32),
    )  # fmt: skip
    arguments = convert(arguments, torch.float32)
    found = int8_attention(**arguments, impl="triton", launch=SMALL)
    assert error(found, segment_attention_torch(**arguments)) < 0.05
    assert found.transpose(1, 2).is_contiguous()
    arguments["lengths"] = None
    assert error(int8_attention(**arguments, impl="triton"), segment_attention_torch(**arguments)) < 0.05


def test_errors():
    arguments = convert(attention_case(5, 5, 3, [3], 80, 2, 1), torch.float32)
    with pytest.raises(ValueError, match="head_dim 80"):
        int8_attention(**arguments, impl="triton")
    with pytest.raises(ValueError, match="pv"):
        int8_attention(**arguments, pv="int4")
    arguments = convert(attention_case(5, 5, 3, [3], 64, 2, 1), torch.float32)
    arguments["image"] = (arguments["image"][0], arguments["image"][1].transpose(2, 3).contiguous().transpose(2, 3))
    with pytest.raises(ValueError, match="strides"):
        int8_attention(**arguments, impl="triton")
