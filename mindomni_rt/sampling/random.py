"""Choices that must come out alike on every backend: noise, and which token comes next. numpy only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import BadRequestError


def noise(seed: int, shape: Sequence[int]) -> NDArray[np.float32]:
    """Standard normal float32 noise: what torch.randn draws on the CPU after manual_seed(seed), to about 1e-6.

    The same numbers on every machine with or without torch: MT19937 seeded with the low 32 bits, 24-bit uniforms,
    Box-Muller over blocks of 16 (cosines before sines); a ragged end redraws the last 16. Needs at least 16 numbers,
    the smallest latent there is.
    """
    size = math.prod(shape)
    if size < 16:
        raise BadRequestError(f"noise of shape {tuple(shape)}: at least 16 numbers")
    # The legacy seeding is the one of the original MT19937, which torch uses too.
    generator = np.random.RandomState(seed & 0xFFFFFFFF)._bit_generator

    def uniforms(count: int) -> NDArray[np.float32]:
        return (generator.random_raw(count) & 0xFFFFFF).astype(np.float32) * np.float32(2**-24)

    def normal(uniform: NDArray[np.float32]) -> NDArray[np.float32]:
        blocks = uniform.reshape(-1, 2, 8)
        radius = np.sqrt(np.float32(-2) * np.log(np.float32(1) - blocks[:, 0]))
        angle = np.float32(2 * math.pi) * blocks[:, 1]
        return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)

    draws = uniforms(size)
    whole = size // 16 * 16
    out = np.empty(size, np.float32)
    out[:whole] = normal(draws[:whole])
    if whole < size:
        out[-16:] = normal(uniforms(16))
    return out.reshape(shape)


def batch_noise(seed: int, count: int, shape: Sequence[int]) -> NDArray[np.float32]:
    """Noise of several images (count, *shape): image i has seed + i, so each can be made again alone."""
    return np.stack([noise(seed + i, (1, *shape))[0] for i in range(count)])


def uniforms(seed: int, count: int) -> NDArray[np.float64]:
    """Numbers in [0, 1), one for each sampled token: every backend inverts the same distribution with them."""
    return np.random.Generator(np.random.Philox(seed & 0xFFFFFFFFFFFFFFFF)).random(count)


def choose_tokens(
    logits: NDArray[np.float32],
    seen: Sequence[int],
    draft: Sequence[int] = (),
    repetition_penalty: float = 1.0,
    temperature: float = 0.0,
    uniforms: Sequence[float] | NDArray[np.float64] = (),
) -> list[int]:
    """What follows `seen`, and what follows each drafted token if all before it hold: one for each row of logits.

    logits (1 + drafts, vocab); uniforms: one for each row, where the temperature is above 0.
    """
    return [
        choose_token(row, [*seen, *draft[:i]], repetition_penalty, temperature, uniforms[i] if temperature > 0 else 0.0)
        for i, row in enumerate(logits)
    ]


def choose_token(
    logits: ArrayLike,
    seen: Iterable[int],
    repetition_penalty: float = 1.0,
    temperature: float = 0.0,
    uniform: float = 0.0,
) -> int:
    """The next token from scores (vocab,).

    The penalty divides positive and multiplies negative scores of every token seen, the prompt's too (transformers'
    RepetitionPenaltyLogitsProcessor). temperature 0 takes the best; above it, softmax(scores / temperature) is
    inverted at `uniform`.
    """
    scores = np.array(logits, np.float32)
    if repetition_penalty != 1.0:
        ids = np.unique(np.fromiter(seen, np.int64))
        values = scores[ids]
        penalty = np.float32(repetition_penalty)
        scores[ids] = np.where(values < 0, values * penalty, values / penalty)
    if temperature <= 0:
        return int(scores.argmax())
    scaled = scores.astype(np.float64) / temperature
    cumulative = np.cumsum(np.exp(scaled - scaled.max()))
    return int(min(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"), len(scores) - 1))
