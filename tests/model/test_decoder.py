"""The decoder's cut: prefix and denoiser equal one pass of the whole sequence under its mask."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mindomni_rt.checkpoint.config import DecoderConfig, RopeConfig, StackConfig
from mindomni_rt.errors import BadRequestError
from mindomni_rt.inputs.positions import image_positions, image_tables, prefix_tables, rope_tables, time_features
from mindomni_rt.model.attention import Workspace
from mindomni_rt.model.decoder import DiffusionDecoder

ROPE = RopeConfig(
    kind="longrope",
    short_factor=(1.0, 1.1, 1.2, 1.3),
    long_factor=(1.0, 2.0, 3.0, 4.0),
    original_max_positions=40,
    max_positions=1024,
)


def small(kv_heads: int = 4) -> DecoderConfig:
    stack = StackConfig(
        hidden_size=32,
        num_layers=3,
        num_heads=4,
        num_kv_heads=kv_heads,
        intermediate_size=48,
        rms_norm_eps=1e-5,
        rope=ROPE,
        fused=True,
    )
    return DecoderConfig(stack=stack)


def tensors(*arrays: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(a).double() for a in arrays]


@settings(max_examples=25, deadline=None)
@given(
    length=st.integers(1, 50),
    rows=st.integers(1, 6),
    columns=st.integers(1, 6),
    steps=st.integers(1, 4),
    pad=st.integers(0, 3),
    kv_heads=st.sampled_from([1, 2, 4]),
    block=st.booleans(),
    seed=st.integers(0, 99),
)
def test_cut_equals_whole(
    length: int, rows: int, columns: int, steps: int, pad: int, kv_heads: int, block: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    config = small(kv_heads)
    decoder = DiffusionDecoder(config).double()
    count = rows * columns
    condition = torch.randn(2, length + pad, 32, dtype=torch.float64)
    latents = torch.randn(2, 4, 2 * rows, 2 * columns, dtype=torch.float64)
    times = np.sort(np.random.default_rng(seed).random(steps))
    blocks = [(length // 3, length // 3 + 1 + length // 2)] if block else []
    tables = prefix_tables(config, length, times, count, blocks)
    features, cos, sin = tensors(tables.features, tables.cos, tables.sin)
    visible = torch.from_numpy(tables.visible)
    image_cos, image_sin = tensors(*image_tables(config, length, count))
    (positions,) = tensors(image_positions(config, rows, columns))
    with torch.no_grad():
        prefix = decoder.prefix(condition[:, :length], features, cos, sin, visible)
        modulation = decoder.modulation(features)
        workspace = Workspace(2, kv_heads, length + 1 + count, 8, latents)
        for step, t in enumerate(times):
            parts = (
                latents,
                prefix.keys,
                prefix.values,
                prefix.time_keys[step],
                prefix.time_values[step],
                modulation[step],
                image_cos,
                image_sin,
                positions,
            )
            expected = decoder(condition, latents, torch.full((2,), t), lengths=[length] * 2, blocks=[blocks] * 2)
            for cut in (decoder.denoise(*parts), decoder.denoise(*parts, workspace=workspace)):
                torch.testing.assert_close(cut, expected, rtol=1e-6, atol=1e-9)


def test_rows_of_a_padded_batch_do_not_see_each_other() -> None:
    torch.manual_seed(0)
    decoder = DiffusionDecoder(small()).double()
    condition, latents = torch.randn(2, 9, 32, dtype=torch.float64), torch.randn(2, 4, 4, 4, dtype=torch.float64)
    t = torch.tensor([0.2, 0.9])
    with torch.no_grad():
        maps: list[torch.Tensor] = []
        together = decoder(condition, latents, t, lengths=[4, 9], feature_maps=maps)
        alone = torch.cat([decoder(condition[:1, :4], latents[:1], t[:1]), decoder(condition[1:], latents[1:], t[1:])])
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-10)
    assert [m.shape for m in maps] == [(2, 4, 32)] * 4  # three layer inputs and the normed output


def test_condition_only_ignores_time_and_image_keys() -> None:
    torch.manual_seed(1)
    config = small()
    decoder = DiffusionDecoder(config).double()
    latents = torch.randn(1, 4, 4, 4, dtype=torch.float64)
    keys = torch.randn(3, 1, 4, 5, 8, dtype=torch.float64)
    time = torch.randn(3, 1, 4, 8, dtype=torch.float64)
    (positions, cos, sin) = tensors(image_positions(config, 2, 2), *rope_tables(ROPE, 8, 6 + np.arange(4), 10))

    def run(time: torch.Tensor) -> torch.Tensor:
        return decoder.denoise(
            latents, keys, keys, time, time, torch.zeros(64), cos, sin, positions, condition_only=True
        )

    with torch.no_grad():
        torch.testing.assert_close(run(time), run(time * 100 + 1), rtol=0, atol=0)
        # Image tokens are no keys either: one token's velocity does not depend on its neighbours' latents.
        before = run(time)
        latents[..., 2:] += 5
        assert torch.equal(before[..., :2], run(time)[..., :2])


def test_position_table_by_hand() -> None:
    config = small()
    table = image_positions(config, 3, 2)  # crop of 192x192: rows 94…96, columns 95…96
    omega = [10000 ** -(k / 8) for k in range(8)]
    x, y = 96 / 3, 95 / 3  # second column, second row
    expected = [f(a * w) for a in (x, y) for f in (math.sin, math.cos) for w in omega]
    np.testing.assert_allclose(table.reshape(3, 2, 32)[1, 1], expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(BadRequestError, match="192"):
        image_positions(config, 193, 1)


def test_time_features_by_hand() -> None:
    found = time_features([0.25], 8)[0]
    expected = [f(0.25 * 10000 ** (-k / 4)) for f in (math.cos, math.sin) for k in range(4)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_what_a_prefix_sees_by_hand() -> None:
    """Three condition tokens, one of padding, two times; tokens 1 and 2 are an image's."""
    tables = prefix_tables(small(), 3, [0.0, 0.5], 6, [(1, 3)], padded=4)
    expected = ["100000", "111000", "111000", "111100", "111010", "111001"]
    assert ["".join("01"[int(x)] for x in row) for row in tables.visible] == expected
    alone = prefix_tables(small(), 3, [0.0, 0.5], 6, [(1, 3)])
    real = [0, 1, 2, 4, 5]
    np.testing.assert_array_equal(alone.visible, tables.visible[np.ix_(real, real)])
    np.testing.assert_array_equal(alone.cos, tables.cos[real])
    np.testing.assert_array_equal(alone.cos, rope_tables(ROPE, 8, [0, 1, 2, 3, 3], 10)[0])
    np.testing.assert_array_equal(alone.features, time_features([0.0, 0.5]))
