"""Every loss term against figures worked out by hand, an independent formula, and float64 finite differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from mindomni_rt.errors import BadRequestError
from mindomni_rt.training.stages import losses


def test_flow_target_and_loss_by_hand():
    x, noise = torch.tensor([[[[3.0]]], [[[1.0]]]]), torch.tensor([[[[1.0]]], [[[5.0]]]])
    x_t, target = losses.noisy_latents(x, noise, torch.tensor([0.25, 1.0]))
    assert x_t.flatten().tolist() == [1.5, 1.0]  # 0.75 · 1 + 0.25 · 3, and the image itself at t = 1
    assert target.flatten().tolist() == [2.0, -4.0]
    assert losses.flow_loss(torch.zeros_like(target), target).item() == 10.0  # (4 + 16) / 2
    weighted = losses.flow_loss(torch.zeros_like(target), target, torch.tensor([3.0, 1.0]))
    assert weighted.item() == 7.0  # (3 · 4 + 16) / 4


def test_times_are_logit_normal():
    times = losses.logit_normal(20000, torch.Generator().manual_seed(0))
    logits = torch.logit(times)
    assert abs(logits.mean().item()) < 0.03
    assert abs(logits.std().item() - 1) < 0.03


def test_feature_kl_by_hand():
    # Standardised, (0, 2) is (-1, 1) and (2, 0) is (1, -1); at temperature 3 the odds are e^(2/3) and e^(-2/3).
    p = 1 / (1 + math.exp(2 / 3))
    expected = p * math.log(p / (1 - p)) + (1 - p) * math.log((1 - p) / p)
    found = losses.feature_kl([torch.tensor([[[0.0, 2.0]]])], [torch.tensor([[[2.0, 0.0]]])])
    assert found.item() == pytest.approx(expected, rel=1e-5)
    # A second map that agrees halves the mean; so does a second token.
    same = torch.tensor([[[1.0, 4.0]]])
    halved = losses.feature_kl([torch.tensor([[[0.0, 2.0]]]), same], [torch.tensor([[[2.0, 0.0]]]), same])
    assert halved.item() == pytest.approx(expected / 2, rel=1e-5)


def test_feature_kl_against_numpy():
    rng = np.random.default_rng(0)
    before, after = rng.normal(size=(3, 2, 5, 8)), rng.normal(size=(3, 2, 5, 8))

    def probabilities(x):
        x = (x - x.mean(-1, keepdims=True)) / (x.std(-1, keepdims=True) + 1e-7) / 3
        e = np.exp(x)
        return e / e.sum(-1, keepdims=True)

    p, q = probabilities(before), probabilities(after)
    expected = (p * np.log(p / q)).sum(-1).mean()
    found = losses.feature_kl(list(torch.from_numpy(before)), list(torch.from_numpy(after)))
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_feature_kl_is_exactly_zero_at_equality():
    maps = [torch.randn(2, 4, 8) for _ in range(3)]
    assert losses.feature_kl(maps, [m.clone() for m in maps]).item() == 0.0


def test_published_coefficients_in_our_units():
    assert losses.per_token_coefficient(1.0, 256) == 256
    assert losses.per_token_coefficient(0.06, 512) == pytest.approx(61.44)
    with pytest.raises(BadRequestError, match="multiple of 16"):
        losses.per_token_coefficient(1.0, 250)


def test_kl_estimators_by_hand():
    policy, reference = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])
    assert losses.kl_tokens(policy, reference, "k1").item() == pytest.approx(math.log(2), rel=1e-6)
    assert losses.kl_tokens(policy, reference, "k2").item() == pytest.approx(math.log(2) ** 2 / 2, rel=1e-6)
    assert losses.kl_tokens(policy, reference, "k3").item() == pytest.approx(0.5 + math.log(2) - 1, rel=1e-6)
    with pytest.raises(BadRequestError, match="k1, k2 or k3"):
        losses.kl_tokens(policy, reference, "k4")


def test_k1_and_k3_are_unbiased():
    logits = torch.tensor([[0.0, 1.0, -1.0, 0.5], [0.3, -0.2, 0.4, 0.0]], dtype=torch.float64)
    log = logits.log_softmax(-1)
    exact = (log[0].exp() * (log[0] - log[1])).sum()
    for name in ("k1", "k3"):
        each = losses.kl_tokens(log[0], log[1], name)
        assert (log[0].exp() * each).sum().item() == pytest.approx(exact.item(), rel=1e-12)


@given(st.lists(st.tuples(st.floats(-20, 0), st.floats(-20, 0)), min_size=1, max_size=20))
@settings(max_examples=100, deadline=None)
def test_k3_is_never_negative_and_zero_at_equality(pairs):
    policy, reference = (torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True))
    assert (losses.kl_tokens(policy, reference, "k3") >= 0).all()
    assert (losses.kl_tokens(policy, policy, "k3") == 0).all()


def test_group_advantages_by_hand():
    # Mean 1, unbiased std sqrt(4/3): the second group agrees with itself and gains nothing.
    found = losses.group_advantages(torch.tensor([0.0, 0.0, 2.0, 2.0, 0.7, 0.7, 0.7, 0.7]), 4)
    one = 1 / (math.sqrt(4 / 3) + 1e-4)
    assert found.tolist() == pytest.approx([-one, -one, one, one, 0, 0, 0, 0], abs=1e-3)
    assert losses.group_advantages(torch.tensor([0.0, 4.0]), 2, scale=False).tolist() == [-2.0, 2.0]
    with pytest.raises(BadRequestError, match="whole groups"):
        losses.group_advantages(torch.zeros(5), 4)


def test_clipped_objective_by_hand():
    old = torch.zeros(2, 2)
    new = torch.log(torch.tensor([[1.5, 1.0], [0.5, 9.0]]))
    mask = torch.tensor([[1, 1], [1, 0]])  # the last token is padding
    terms = losses.clipped_objective(new, old, torch.tensor([1.0, -1.0]), mask)
    # first: min(1.5, 1.2) and 1, mean 1.1; second: min(-0.5, -0.8) = -0.8. Minus their mean: -0.15.
    assert terms.loss.item() == pytest.approx(-0.15, abs=1e-6)
    assert terms.clip_fraction.item() == pytest.approx(2 / 3)
    assert terms.ratio.item() == pytest.approx((1.25 + 0.5) / 2)


def test_ratio_is_exactly_one_on_policy():
    log = torch.randn(3, 5).log_softmax(-1)
    terms = losses.clipped_objective(log, log.clone(), torch.tensor([1.0, -2.0, 0.5]), torch.ones(3, 5))
    assert terms.ratio.item() == 1.0
    assert terms.clip_fraction.item() == 0.0


def test_text_loss_by_hand():
    logits = torch.log(torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]]]))
    labels = torch.tensor([[0, losses.IGNORE, 2]])
    assert losses.text_loss(logits, labels).item() == pytest.approx(-(math.log(0.5) + math.log(0.6)) / 2, rel=1e-6)
    assert losses.text_loss(logits, torch.full((1, 3), losses.IGNORE)).item() == 0.0
    assert losses.entropy(logits)[0, 0].item() == pytest.approx(1.5 * math.log(2), rel=1e-6)


def test_sequence_mean_counts_sequences_not_tokens():
    values, mask = torch.tensor([[1.0, 3.0], [10.0, 99.0]]), torch.tensor([[1, 1], [1, 0]])
    assert losses.sequence_mean(values, mask).item() == 6.0


def test_gradients_against_finite_differences():
    torch.manual_seed(0)
    double = dict(dtype=torch.float64, requires_grad=True)
    policy, advantages = torch.randn(2, 3, **double), torch.randn(2, dtype=torch.float64)
    old, mask = policy.detach() + 0.1 * torch.randn(2, 3, dtype=torch.float64), torch.ones(2, 3)
    gradcheck(lambda p: losses.clipped_objective(p, old, advantages, mask).loss, policy)
    for name in ("k1", "k2", "k3"):
        gradcheck(lambda p, name=name: losses.kl_tokens(p, old, name).mean(), policy)
    features, reference = torch.randn(1, 2, 6, **double), torch.randn(1, 2, 6, dtype=torch.float64)
    gradcheck(lambda f: losses.feature_logits(f), features)
    gradcheck(lambda f: losses.feature_kl([reference, reference], [f, f * f]), features)
    gradcheck(lambda v: losses.flow_loss(v, reference, torch.tensor([2.0], dtype=torch.float64)), features)
    labels = torch.tensor([[1, losses.IGNORE], [0, 2]])
    gradcheck(lambda x: losses.text_loss(x, labels), torch.randn(2, 2, 4, **double))
