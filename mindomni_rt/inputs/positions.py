"""Host-made tables: rotary cos/sin, multimodal positions, the image position table, time features.

Every backend takes its positions from here, so they agree by construction. Everything is numpy float32, computed the
way transformers computes it (inverse frequencies, angles and cosines in float32).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..checkpoint.config import DecoderConfig, LanguageConfig, RopeConfig, StackConfig
from ..errors import BadRequestError

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


def rope_tables(rope: RopeConfig, head_dim: int, positions: ArrayLike, length: int) -> tuple[Floats, Floats]:
    """Cosine and sine of the rotary angles.

    positions: (S,) or, for kind "mrope", (3, S) of time, row and column. length: the full sequence length; LongRoPE
    takes its long factors when it exceeds the original context (Phi-3). Returns two float32 arrays (S, head_dim / 2);
    the rotate-half convention pairs channel i with i + head_dim / 2.
    """
    place = np.asarray(positions, dtype=np.float32)
    powers = np.float32(rope.theta) ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))
    scale = 1.0
    if rope.kind == "longrope":
        factors = rope.long_factor if length > rope.original_max_positions else rope.short_factor
        powers = powers * np.asarray(factors, dtype=np.float32)
        ratio = rope.max_positions / rope.original_max_positions
        if ratio > 1:
            scale = math.sqrt(1 + math.log(ratio) / math.log(rope.original_max_positions))
    inverse = (np.float32(1) / powers).astype(np.float32)
    if rope.kind == "mrope":
        if place.ndim == 1:  # text alone: the three axes agree
            place = np.broadcast_to(place, (3, place.shape[0]))
        axis = np.repeat(np.arange(len(rope.mrope_section)) % 3, rope.mrope_section)  # which axis turns each channel
        angles = place[axis].T * inverse
    else:
        angles = place[:, None] * inverse
    return (np.cos(angles) * np.float32(scale)).astype(np.float32), (np.sin(angles) * np.float32(scale)).astype(
        np.float32
    )


def mrope_positions(
    token_ids: ArrayLike, grids: Sequence[tuple[int, int, int]], config: LanguageConfig, merge_size: int = 2
) -> tuple[Ints, int]:
    """Qwen2.5-VL's three-axis positions of a prompt.

    token_ids: (S,), with one image_token_id for each merged patch. grids: (t, h, w) patches of each image, in order.
    Returns positions (3, S) and the position of the first generated token.
    """
    ids = np.asarray(token_ids, dtype=np.int64)
    is_image = ids == config.image_token_id
    expected = sum(t * h * w // merge_size**2 for t, h, w in grids)
    if int(is_image.sum()) != expected:
        raise BadRequestError(f"{int(is_image.sum())} image tokens in the prompt, {expected} in the images")
    out = np.zeros((3, len(ids)), dtype=np.int64)
    at = following = 0
    for t, h, w in grids:
        first = at + int(np.argmax(is_image[at:]))
        out[:, at:first] = following + np.arange(first - at)
        following += first - at
        rows, columns = h // merge_size, w // merge_size
        span = t * rows * columns
        # Still images: every time index is 0 (Qwen2.5-VL scales time by seconds, and an image lasts none).
        grid = np.stack(np.meshgrid(np.zeros(t, int), np.arange(rows), np.arange(columns), indexing="ij"))
        out[:, first : first + span] = following + grid.reshape(3, span)
        following += max(rows, columns)
        at = first + span
    out[:, at:] = following + np.arange(len(ids) - at)
    return out, following + len(ids) - at


def image_positions(config: DecoderConfig, rows: int, columns: int) -> Floats:
    """The decoder's 2-D sin-cos position table, cropped at its centre. Returns (rows * columns, hidden) float32.

    rows and columns count latent patches (16 pixels each); at most config.position_grid of either.
    """
    side = config.position_grid
    if not (0 < rows <= side and 0 < columns <= side):
        raise BadRequestError(
            f"image of {rows}x{columns} tokens: each side must be 1 to {side} ({16 * side} pixels at most)"
        )
    quarter = config.stack.hidden_size // 4
    omega = 1.0 / 10000 ** (np.arange(quarter, dtype=np.float64) / quarter)

    def axis(count: int) -> NDArray[np.float64]:
        start = (side - count) // 2
        angles = (np.arange(start, start + count) / (side / config.position_base))[:, None] * omega
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    x, y = axis(columns), axis(rows)
    table = np.concatenate(
        [
            np.broadcast_to(x[None], (rows, columns, x.shape[1])),
            np.broadcast_to(y[:, None], (rows, columns, y.shape[1])),
        ],
        axis=-1,
    )
    return table.reshape(rows * columns, -1).astype(np.float32)


def time_features(times: ArrayLike, dim: int = 256) -> Floats:
    """Sinusoids of t in [0, 1] (not scaled by 1000): cosines, then sines; longest period 10000. Returns (T, dim)."""
    t = np.asarray(times, dtype=np.float32).reshape(-1, 1)
    half = dim // 2
    frequencies = np.exp(np.float32(-math.log(10000)) * np.arange(half, dtype=np.float32) / np.float32(half))
    angles = t * frequencies
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def text_tables(stack: StackConfig, positions: Ints, following: int, count: int) -> tuple[Floats, Floats]:
    """Rotary tables (S + count, D/2) of a prompt at positions (3, S) and of `count` tokens from `following` on."""
    ahead = np.broadcast_to(following + np.arange(count), (3, count))
    places = np.concatenate([positions, ahead], axis=1)
    return rope_tables(stack.rope, stack.head_dim, places, places.shape[1])


@dataclass(frozen=True)
class PrefixTables:
    """What the prefix pass reads besides the condition: L condition tokens, then the T time tokens of a schedule.

    features (T, 256) of the times; cos, sin (L + T, D/2), the time tokens all at the position after the condition;
    visible (L + T, L + T) bool, True = may attend: the condition is causal, a time token sees the condition and itself.
    """

    features: Floats
    cos: Floats
    sin: Floats
    visible: NDArray[np.bool_]


def prefix_tables(
    config: DecoderConfig,
    length: int,
    times: ArrayLike,
    image_tokens: int,
    blocks: Sequence[tuple[int, int]] = (),
    padded: int | None = None,
) -> PrefixTables:
    """Tables of the prefix pass of one condition of `length` tokens.

    times (T,) of the schedule. image_tokens: of the image to be generated; LongRoPE chooses its factors by the whole
    length. blocks: [start, end) of input images' tokens, which see each other in both directions. padded: rows of a
    batch have this many places for the condition, the unused ones on the right; nothing else sees those.
    """
    stack, steps = config.stack, len(np.asarray(times))
    longest = length if padded is None else padded
    place = np.concatenate([np.minimum(np.arange(longest), length), np.full(steps, length)])
    cos, sin = rope_tables(stack.rope, stack.head_dim, place, length + 1 + image_tokens)
    total = longest + steps
    visible = np.tri(total, dtype=np.bool_)
    visible[:, length:] = np.eye(total, dtype=np.bool_)[:, length:]
    for start, end in blocks:
        visible[start:end, start:end] = True
    return PrefixTables(time_features(times, config.time_frequencies), cos, sin, visible)


def image_tables(config: DecoderConfig, length: int, image_tokens: int) -> tuple[Floats, Floats]:
    """Rotary tables (N, D/2) of the image tokens behind a condition of `length` tokens and one time token."""
    first = length + 1
    places = np.arange(first, first + image_tokens)
    return rope_tables(config.stack.rope, config.stack.head_dim, places, first + image_tokens)
