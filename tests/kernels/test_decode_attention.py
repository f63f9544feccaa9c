"""decode_attention against plain causal attention in float64."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import DEVICE, FLOATS, TOLERANCE, error

from mindomni_rt.kernels.decode_attention import decode_attention
from mindomni_rt.kernels.launch import Launch

SMALL = Launch(block_m=16, block_n=16, warps=4, stages=1)


def case(capacity, tokens, heads, kv_heads, head_dim, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = ((heads, tokens), (kv_heads, capacity), (kv_heads, capacity))
    return [
        torch.randn(1, h, n, head_dim, generator=g, dtype=torch.float64).to(DEVICE, dtype).contiguous()
        for h, n in shapes
    ]


def exact(q, keys, values, length):
    """Row by row, in float64."""
    group, tokens = q.shape[1] // keys.shape[1], q.shape[2]
    rows = []
    for token in range(tokens):
        seen = length - tokens + token + 1
        k, v = (t[:, :, :seen].double().repeat_interleave(group, 1) for t in (keys, values))
        scores = (q[:, :, token : token + 1].double() @ k.transpose(-1, -2)) / q.shape[-1] ** 0.5
        rows.append(scores.softmax(-1) @ v)
    return torch.cat(rows, dim=2)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(7, 1, 128), (4, 4, 64), (6, 2, 16)])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_types_and_groups(heads, kv_heads, head_dim, dtype, impl):
    q, k, v = case(50, 1, heads, kv_heads, head_dim, dtype)
    length = torch.tensor([37], dtype=torch.int32, device=DEVICE)
    found = decode_attention(q, k, v, length, impl=impl, launch=SMALL, splits=4)
    assert error(found, exact(q, k, v, 37)) < TOLERANCE[dtype] * (3 if impl == "torch" else 1)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 130])
@pytest.mark.parametrize("splits", [1, 2, 8])
def test_lengths_and_splits(length, splits):
    q, k, v = case(130, 1, 2, 1, 32, torch.float32)
    k[:, :, length:] = float("nan")  # nothing beyond the length may be used
    v[:, :, length:] = float("nan")
    place = torch.tensor([length], dtype=torch.int32, device=DEVICE)
    found = decode_attention(q, k, v, place, impl="triton", launch=SMALL, splits=splits)
    assert error(found, exact(q, k, v, length)) < 3e-6


@pytest.mark.parametrize(("tokens", "length"), [(2, 2), (5, 5), (5, 33), (9, 48)])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_several_tokens_are_causal_among_themselves(tokens, length, impl):
    q, k, v = case(48, tokens, 6, 2, 32, torch.float32)
    place = torch.tensor([length], dtype=torch.int32, device=DEVICE)
    found = decode_attention(q, k, v, place, impl=impl, launch=SMALL, splits=4)
    assert error(found, exact(q, k, v, length)) < 3e-6
    assert impl == "torch" or found.transpose(1, 2).is_contiguous()


def test_default_launch_and_a_slice_of_a_larger_cache():
    caches = torch.randn(2, 3, 1, 2, 200, 64, device=DEVICE)
    q = torch.randn(1, 1, 8, 64, device=DEVICE).transpose(1, 2)
    place = torch.tensor([170], dtype=torch.int32, device=DEVICE)
    found = decode_attention(q, caches[0, 1], caches[1, 1], place, impl="triton")
    assert error(found, exact(q, caches[0, 1], caches[1, 1], 170)) < 3e-6


def test_errors():
    q, k, v = case(10, 1, 2, 1, 24, torch.float32)
    place = torch.tensor([4], dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="power of two"):
        decode_attention(q, k, v, place, impl="triton")
    with pytest.raises(ValueError, match="int32"):
        decode_attention(q, k, v, place.long())
    with pytest.raises(ValueError, match="does not fit"):
        decode_attention(q, k[..., :16], v[..., :16], place)
