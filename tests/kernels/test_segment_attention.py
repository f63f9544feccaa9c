"""segment_attention against its meaning in float64."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import FLOATS, TOLERANCE, convert, error
from kernels_cases import attention_case as case

from mindomni_rt.kernels.launch import Launch, split_head
from mindomni_rt.kernels.segment_attention import segment_attention, segment_attention_torch

SMALL = Launch(block_m=32, block_n=32, warps=4, stages=1)


def check(arguments, dtype, **extra):
    rounded = convert(arguments, dtype)
    expected = segment_attention_torch(**convert(rounded, torch.float64))
    found = segment_attention(**rounded, impl="triton", **extra)
    assert error(found, expected) < TOLERANCE[dtype]
    return found


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
def test_head_sizes_and_types(head_dim, dtype):
    check(case(65, 65, 40, [33, 7], head_dim, 2, 1), dtype, launch=SMALL)


@pytest.mark.parametrize("queries", [1, 7, 63, 65, 97])
@pytest.mark.parametrize("lengths", [[1, 63], [64, 31], [97, 0]], ids=str)
def test_odd_lengths_with_a_prefix_per_branch(queries, lengths):
    check(case(queries, queries, 97, lengths, 96, 1, 1), torch.float32, launch=SMALL)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (7, 1)])
def test_grouped_heads(heads, kv_heads):
    check(case(33, 33, 20, [20, 5], 96, heads, kv_heads), torch.float32, launch=SMALL)


def test_condition_only_and_no_time():
    check(case(17, 0, 50, [50, 13], 96, 2, 2, time=False), torch.float32, launch=SMALL)
    check(case(17, 40, 50, [50, 13], 96, 2, 2, time=False), torch.float32, launch=SMALL)


def test_default_launch_and_lengths():
    arguments = case(70, 70, 40, [40], 96, 1, 1)
    arguments["lengths"] = None
    check(arguments, torch.float16)


def test_strided_inputs_and_shared_rows():
    """Slices of a fused projection, a cache with room to spare, one condition for the whole batch, out given."""
    g = torch.Generator().manual_seed(1)
    fused = torch.randn(2, 33, 3 * 4 * 96, generator=g)
    q, k, v = (t.unflatten(-1, (4, 96)).transpose(1, 2) for t in fused.chunk(3, dim=-1))
    cache = torch.randn(2, 1, 4, 64, 96, generator=g)
    time = torch.randn(2, 50, 1, 4, 96, generator=g)[:, 7]
    arguments = dict(
        q=q, condition=(cache[0, :, :, :19], cache[1, :, :, :19]), time=(time[0], time[1]), image=(k, v), lengths=None
    )
    out = torch.zeros(2, 4, 33, 96)
    assert check(arguments, torch.float32, out=out, launch=SMALL) is out
    assert check(arguments, torch.float32, launch=SMALL).transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("lengths", [[19, 4], [11]], ids=str)
def test_images_of_a_branch_share_its_prefix(lengths):
    arguments = case(17, 17, 20, [1] * 4, 96, 2, 2)
    shared = len(lengths)
    arguments["condition"] = tuple(t[:shared] for t in arguments["condition"])
    arguments["time"] = tuple(t[:shared] for t in arguments["time"])
    arguments["lengths"] = torch.tensor(lengths, dtype=torch.int32)
    found = check(arguments, torch.float32, launch=SMALL)
    rows = [[t.repeat_interleave(4 // shared, 0) for t in arguments[name]] for name in ("condition", "time")]
    spread = {**arguments, "condition": tuple(rows[0]), "time": tuple(rows[1])}
    spread["lengths"] = arguments["lengths"].repeat_interleave(4 // shared)
    torch.testing.assert_close(found.double().cpu(), segment_attention_torch(**spread), rtol=1e-4, atol=1e-5)


def test_large_scores_stay_finite():
    arguments = case(17, 40, 8, [8], 64, 1, 1)
    arguments["q"] *= 200
    check(arguments, torch.float32, launch=SMALL)


def test_both_implementations_by_name_and_errors():
    arguments = convert(case(5, 5, 3, [3], 96, 2, 1), torch.float32)
    torch.testing.assert_close(segment_attention(**arguments), segment_attention(**arguments, impl="torch"))
    with pytest.raises(ValueError, match="impl"):
        segment_attention(**arguments, impl="cuda")
    with pytest.raises(ValueError, match="head_dim 24"):
        segment_attention(**convert(case(5, 5, 3, [3], 24, 1, 1), torch.float32), impl="triton")
    with pytest.raises(ValueError, match="does not fit"):
        segment_attention(arguments["q"], condition=tuple(t[..., :64] for t in arguments["condition"]))
    with pytest.raises(ValueError, match="int32"):
        segment_attention(**{**arguments, "lengths": torch.tensor([3])})


def test_split_of_a_head():
    assert [split_head(d) for d in (64, 80, 96, 128, 48)] == [(32, 32), (64, 16), (64, 32), (64, 64), (32, 16)]
    assert [split_head(d) for d in (16, 24, 112, 72)] == [(0, 0)] * 4
