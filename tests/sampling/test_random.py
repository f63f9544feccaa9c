"""Noise against torch, token choice against transformers, times by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor

from mindomni_rt.errors import BadRequestError
from mindomni_rt.sampling.random import batch_noise, choose_token, noise, uniforms
from mindomni_rt.sampling.schedule import guide, timesteps


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**63 - 1), size=st.integers(16, 700))
def test_noise_is_torch_noise(seed: int, size: int) -> None:
    expected = torch.randn(size, generator=torch.Generator().manual_seed(seed)).numpy()
    np.testing.assert_allclose(noise(seed, (size,)), expected, atol=2e-6)


def test_noise_of_a_full_image() -> None:
    expected = torch.randn((1, 4, 128, 128), generator=torch.Generator().manual_seed(42)).numpy()
    found = noise(42, (1, 4, 128, 128))
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert found.dtype == np.float32
    with pytest.raises(BadRequestError):
        noise(0, (15,))


def test_each_image_of_a_batch_can_be_made_alone() -> None:
    batch = batch_noise(7, 3, (4, 6, 8))
    for index in range(3):
        assert np.array_equal(batch[index], noise(7 + index, (1, 4, 6, 8))[0])


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 9999), penalty=st.sampled_from([1.0, 1.05, 1.3, 0.8]))
def test_greedy_choice_is_that_of_transformers(seed: int, penalty: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, 50, generator=generator)
    seen = torch.randint(0, 50, (1, 30), generator=generator)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(seen, logits.clone()).argmax().item()
    assert choose_token(logits[0].numpy(), seen[0].tolist(), penalty) == expected


def test_drawn_tokens_follow_the_softmax() -> None:
    logits = np.array([1.0, 2.0, 0.0, -1.0], np.float32)
    draws = [choose_token(logits, [], temperature=0.7, uniform=u) for u in uniforms(5, 20000)]
    scaled = np.exp(logits / 0.7)
    np.testing.assert_allclose(np.bincount(draws, minlength=4) / 20000, scaled / scaled.sum(), atol=0.015)
    assert choose_token(logits, [], temperature=0.7, uniform=0.0) == 0
    assert choose_token(logits, [], temperature=0.7, uniform=np.nextafter(1, 0)) == 3


def test_times_by_hand() -> None:
    np.testing.assert_allclose(timesteps(4), [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(timesteps(2, shift=3.0), [0, 0.5 / (0.5 + 3 - 1.5), 1])
    for steps, shift in ((0, 1.0), (-1, 1.0), (4, 0.0)):
        with pytest.raises(BadRequestError, match="expected"):
            timesteps(steps, shift)


def test_guidance_by_hand() -> None:
    assert guide(2.0, 1.0, 3.0) == 4.0
    assert guide(2.0, 1.0, 1.0) == 2.0
