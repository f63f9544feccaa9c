"""Every loss term of the three stages as a plain function of tensors.

Axes: B batch, N image tokens, C hidden, S sequence, V vocabulary, G group. Flow convention: t = 0 is noise, t = 1 the
image, x_t = (1 - t) noise + t x, target velocity x - noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mindomni_rt.errors import BadRequestError

TEMPERATURE = 3.0  # of the feature softmax
STANDARDISE_EPS = 1e-7
ADVANTAGE_EPS = 1e-4
IGNORE = -100


def noisy_latents(latents: Tensor, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """x_t and the target velocity, both (B, 4, h, w), of clean latents, noise and times (B,)."""
    t = times.view(-1, *[1] * (latents.ndim - 1)).to(latents.dtype)
    return (1 - t) * noise + t * latents, latents - noise


def logit_normal(count: int, generator: torch.Generator) -> Tensor:
    """Times (count,) in (0, 1): the sigmoid of a standard normal."""
    return torch.sigmoid(torch.randn(count, generator=generator))


def flow_loss(velocity: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean squared error: mean of each sample, then (weighted) mean of the batch. A scalar."""
    if velocity.dtype != torch.float64:
        velocity, target = velocity.float(), target.float()
    each = (velocity - target).square().flatten(1).mean(1)
    return each.mean() if weights is None else (each * weights).sum() / weights.sum()


def feature_logits(features: Tensor) -> Tensor:
    """Log-probabilities over the hidden axis: each token standardised (mean 0, biased std 1), then softmax at T = 3."""
    x = features.float() if features.dtype != torch.float64 else features
    x = x - x.mean(-1, keepdim=True)
    x = x / (x.std(-1, keepdim=True, unbiased=False) + STANDARDISE_EPS)
    return F.log_softmax(x / TEMPERATURE, dim=-1)


def feature_kl(reference: Sequence[Tensor], student: Sequence[Tensor]) -> Tensor:
    """KL(reference ‖ student) of feature maps, a scalar: mean over batch, image tokens and maps.

    reference, student: maps (B, N, C), one for each layer. The released code sums over tokens instead: multiply its
    coefficient by the token count (`per_token_coefficient`).
    """
    if len(reference) != len(student) or not reference:
        raise BadRequestError(f"feature KL: {len(reference)} reference maps for {len(student)} student maps")
    layers = []
    for before, after in zip(reference, student, strict=True):
        target, log = feature_logits(before), feature_logits(after)
        layers.append((target.exp() * (target - log)).sum(-1).mean())
    return torch.stack(layers).mean()


def per_token_coefficient(published: float, image_size: int) -> float:
    """The paper's coefficient of a feature KL (a sum over tokens) for our mean over tokens.

    image_size: the pixels a side at which the published value was used; a token covers 16. 1.0 at 256 pixels is 256,
    0.06 at 512 pixels is 61.44.
    """
    if image_size <= 0 or image_size % 16:
        raise BadRequestError(f"image_size = {image_size}: expected a positive multiple of 16")
    return published * (image_size // 16) ** 2


def without_token(logits: Tensor, token_id: int) -> Tensor:
    """Logits (…, V) in which one token has probability 0: an image placeholder in text would want an image."""
    index = torch.tensor([token_id], device=logits.device)
    # Not the lowest number or -inf: entropy multiplies a probability of 0 by its logarithm.
    return logits.index_fill(-1, index, -1e9)


def token_log_probs(logits: Tensor, token_ids: Tensor) -> Tensor:
    """log p of the given tokens: logits (B, S, V), token_ids (B, S) -> (B, S) float32 (float64 stays)."""
    logits = logits.float() if logits.dtype != torch.float64 else logits
    return torch.gather(logits.log_softmax(-1), -1, token_ids.unsqueeze(-1)).squeeze(-1)


def entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of each next-token distribution: (…, V) -> (…)."""
    log = logits.float().log_softmax(-1)
    return -(log.exp() * log).sum(-1)


def sequence_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens of each sequence, then over sequences (values, mask (B, S)). A scalar."""
    mask = mask.to(values.dtype)
    return ((values * mask).sum(1) / mask.sum(1).clamp_min(1)).mean()


def text_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Next-token cross-entropy, a scalar: logits (B, S, V) predict labels (B, S), of which IGNORE counts for nothing.

    Labels stand at the place of the token that predicts them. Zero when nothing is labelled.
    """
    wanted = labels != IGNORE
    if not bool(wanted.any()):
        return logits.sum() * 0.0
    return -token_log_probs(logits, labels.clamp_min(0))[wanted].mean()


def kl_tokens(policy: Tensor, reference: Tensor, estimator: str = "k3") -> Tensor:
    """Per-token estimate of KL(policy ‖ reference) from log-probabilities of sampled tokens, any shape.

    k1 = log p - log r (unbiased, signed); k2 = k1² / 2 (biased, the right gradient); k3 = exp(-k1) + k1 - 1
    (unbiased, never negative; the published choice). Source: J. Schulman's note on approximating KL.
    """
    difference = reference - policy
    if estimator == "k1":
        return -difference
    if estimator == "k2":
        return difference.square() / 2
    if estimator == "k3":
        return torch.expm1(difference) - difference
    raise BadRequestError(f"KL estimator {estimator!r}: expected k1, k2 or k3")


def group_advantages(rewards: Tensor, group: int, scale: bool = True) -> Tensor:
    """(prompts * G,) rewards, groups adjacent -> advantages: minus the group's mean, over its unbiased std + 1e-4.

    scale False leaves out the division (Dr. GRPO).
    """
    if group < 2 or rewards.numel() % group:
        raise BadRequestError(f"{rewards.numel()} rewards in groups of {group}: expected whole groups of at least 2")
    grouped = rewards.float().view(-1, group)
    centred = grouped - grouped.mean(1, keepdim=True)
    if scale:
        centred = centred / (grouped.std(1, keepdim=True, unbiased=True) + ADVANTAGE_EPS)
    return centred.flatten()


@dataclass(frozen=True)
class PolicyTerms:
    """The clipped objective (a scalar to minimise), the mean ratio and the share of tokens that the clip decides."""

    loss: Tensor
    ratio: Tensor
    clip_fraction: Tensor


def clipped_objective(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, low: float = 0.2, high: float = 0.2
) -> PolicyTerms:
    """-min(r A, clip(r, 1 - low, 1 + high) A), mean over each sequence's tokens, then over sequences.

    log_probs, old_log_probs, mask (B, S) of generated tokens; advantages (B,).
    """
    ratio = torch.exp(log_probs - old_log_probs)
    clipped = ratio.clamp(1 - low, 1 + high)
    gain = advantages.unsqueeze(1)
    active = ((ratio * gain) > (clipped * gain)) & mask.bool()
    return PolicyTerms(
        loss=-sequence_mean(torch.minimum(ratio * gain, clipped * gain), mask),
        ratio=sequence_mean(ratio.detach(), mask),
        clip_fraction=active.float().sum() / mask.sum().clamp_min(1),
    )
