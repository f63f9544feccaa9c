"""Many requests at once: text over the model's static cache, images over cached prefixes. For RGPO and evaluation.

What the pipeline computes for one request, for a batch of unequal lengths: text rows are padded on the left so that
they grow together, conditions on the right. Agreement with the pipeline is tested.

Axes: B batch, P prompt tokens, T steps, L condition tokens, N image tokens, C hidden, H heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mindomni_rt.inputs.positions import image_positions, rope_tables, time_features
from mindomni_rt.model.attention import Attend, attention
from mindomni_rt.model.cache import StaticCache
from mindomni_rt.model.decoder import DiffusionDecoder, Span
from mindomni_rt.sampling.schedule import guide, timesteps

from . import losses
from .contexts import Context, Contexts


@dataclass(frozen=True)
class Completion:
    """Token ids of one completion, the end token included if it came. cut: the limit came first."""

    token_ids: list[int]
    cut: bool


@torch.no_grad()
def write(
    contexts: Contexts,
    prompts: Sequence[Context],
    max_new_tokens: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    repetition_penalty: float | None = None,
    forbidden: int | None = None,
) -> list[Completion]:
    """Continues every conversation. temperature 0 is greedy; above it tokens are sampled with the generator (CPU).

    repetition_penalty: None is the checkpoint's own, as in the pipeline. forbidden: a token that is never chosen.
    """
    model, config, device = contexts.model.language, contexts.config.language, contexts.device
    lengths = [len(c.token_ids) for c in prompts]
    count, longest = len(prompts), max(lengths)
    ids = np.full((count, longest), contexts.eos, np.int64)
    places = np.zeros((3, count, longest), np.int64)
    for row, context in enumerate(prompts):
        ids[row, longest - lengths[row] :] = context.token_ids
        places[:, row, longest - lengths[row] :] = context.positions
    following = places[0, :, -1] + 1
    pads = longest - torch.tensor(lengths, device=device)
    real = torch.arange(longest + max_new_tokens, device=device) >= pads[:, None]  # (B, capacity)
    images = [c.patches for c in prompts if c.patches is not None]
    tokens = torch.from_numpy(ids).to(device)
    x = model.embed(tokens, contexts.vision(images) if images else None)
    cache = StaticCache(config.stack, longest + max_new_tokens, count, x.dtype, device)
    mask = real[:, None, None, :longest].expand(-1, 1, longest, -1).tril()
    mask = mask | torch.eye(longest, dtype=torch.bool, device=device)  # padding sees itself: no softmax is empty
    ends = torch.tensor(contexts.config.generation.eos_token_ids, device=device)
    done = torch.zeros(count, dtype=torch.bool, device=device)
    penalty = contexts.config.generation.repetition_penalty if repetition_penalty is None else repetition_penalty
    seen = torch.zeros(count, config.vocab_size, dtype=torch.bool, device=device)
    for row, context in enumerate(prompts):
        seen[row, torch.from_numpy(context.token_ids).to(device)] = True
    chosen: list[Tensor] = []
    start = 0
    tables = _tables(contexts, places)
    for index in range(max_new_tokens):
        for layer, block in enumerate(model.layers):
            x = block(x, *tables, _cached(cache, layer, start, mask))
        start += x.shape[1]
        logits = _penalised(model.logits(x[:, -1]).float(), seen, penalty)
        if forbidden is not None:
            logits = losses.without_token(logits, forbidden)
        token = _choose(logits, temperature, generator)
        seen.scatter_(1, token[:, None], True)
        chosen.append(torch.where(done, ends[0], token))
        done = done | torch.isin(token, ends)
        if _everywhere(done) or index + 1 == max_new_tokens:
            break
        tables = _tables(contexts, np.broadcast_to((following + index)[None, :, None], (3, count, 1)))
        mask = real[:, None, None, : start + 1]
        x = model.embed(token[:, None])
    rows = torch.stack(chosen, 1).cpu().tolist()
    out = []
    for row, finished in zip(rows, done.tolist(), strict=True):
        end = next((i for i, t in enumerate(row) if t in contexts.config.generation.eos_token_ids), len(row) - 1)
        out.append(Completion(row[: end + 1], not finished))
    return out


def _everywhere(done: Tensor) -> bool:
    """Whether all rows are done in all processes: sharded weights are gathered by all of them, or by none."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        left = (~done).sum()
        torch.distributed.all_reduce(left)
        return int(left) == 0
    return bool(done.all())


def _cached(cache: StaticCache, layer: int, start: int, mask: Tensor) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, *cache.write(layer, k, v, start), mask=mask)

    return attend


def _tables(contexts: Contexts, places: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """(B, S, D/2) rotary tables of positions (3, B, S)."""
    stack = contexts.config.language.stack
    _, count, length = places.shape
    made = rope_tables(stack.rope, stack.head_dim, places.reshape(3, -1), length)
    cos, sin = (torch.from_numpy(t).view(count, length, -1).to(contexts.device) for t in made)
    return cos, sin


def _penalised(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits (B, V) after the repetition penalty on tokens seen (B, V), as `sampling.choose_token` applies it."""
    if penalty == 1:
        return logits
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def _choose(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    if temperature <= 0:
        return logits.argmax(-1)
    cumulative = (logits.double() / temperature).softmax(-1).cumsum(-1)
    draw = torch.rand(len(logits), 1, generator=generator, dtype=torch.float64).to(logits.device) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, draw, right=True).squeeze(-1).clamp_max(logits.shape[-1] - 1)


@dataclass(frozen=True)
class Branch:
    """A batch of prefixes: K/V of the condition (layers × (B, H, L, D)), of the T time tokens, AdaLN (T, 2C)."""

    keys: list[Tensor]
    values: list[Tensor]
    time_keys: list[Tensor]
    time_values: list[Tensor]
    modulation: Tensor
    lengths: list[int]


@torch.no_grad()
def branch(
    decoder: DiffusionDecoder,
    condition: Tensor,
    lengths: Sequence[int],
    spans: Sequence[Sequence[Span]],
    steps: int,
    image_tokens: int,
) -> Branch:
    """The prefix pass of a padded batch: condition (B, L, C) and the time tokens of all steps."""
    stack, device = decoder.config.stack, condition.device
    count, longest = condition.shape[:2]
    features = torch.from_numpy(time_features(timesteps(steps)[:-1], decoder.config.time_frequencies))
    features = features.to(device, decoder.x_embedder.proj.weight.dtype)
    times = decoder.time_token(features).expand(count, -1, -1)
    x = torch.cat([condition, times.to(condition.dtype)], 1)
    made = [
        rope_tables(
            stack.rope,
            stack.head_dim,
            np.concatenate([np.minimum(np.arange(longest), length), np.full(steps, length)]),
            length + 1 + image_tokens,
        )
        for length in lengths
    ]
    cos, sin = (torch.from_numpy(np.stack([m[i] for m in made])).to(device) for i in (0, 1))
    place = torch.arange(longest + steps, device=device)
    row, column = place.view(1, -1, 1), place.view(1, 1, -1)
    mask = (column < torch.tensor(list(lengths), device=device).view(-1, 1, 1)) & (column <= row)
    for index, row_spans in enumerate(spans):
        for first, end in row_spans:
            inside = (place >= first) & (place < end)
            mask[index] |= inside[:, None] & inside[None, :]
    mask = (mask | (row == column)).unsqueeze(1)
    keys: list[Tensor] = []
    values: list[Tensor] = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys.append(k)
        values.append(v)
        return attention(q, k, v, mask=mask)

    for layer in decoder.llm.layers:
        x = layer(x, cos, sin, attend)
    return Branch(
        [k[:, :, :longest] for k in keys],
        [v[:, :, :longest] for v in values],
        [k[:, :, longest:] for k in keys],
        [v[:, :, longest:] for v in values],
        decoder.modulation(features),
        list(lengths),
    )


@torch.no_grad()
def paint(
    contexts: Contexts,
    guided: Branch,
    noise: Tensor,
    steps: int,
    unguided: Branch | None = None,
    guidance: float = 1.0,
) -> Tensor:
    """Euler from noise (B, 4, h, w) to latents. unguided may be a batch of one."""
    decoder, device = contexts.model.decoder, contexts.device
    latents = noise.to(device).float()
    patch = contexts.config.decoder.patch_size
    rows, columns = latents.shape[-2] // patch, latents.shape[-1] // patch
    positions = torch.from_numpy(image_positions(decoder.config, rows, columns)).to(device)
    branches = [guided] if unguided is None or guidance == 1 else [guided, unguided]
    tables = [_image_tables(decoder, b, len(latents), rows * columns, device) for b in branches]
    times = timesteps(steps)
    for step in range(steps):
        velocities = [_velocity(decoder, b, t, step, latents, positions) for b, t in zip(branches, tables, strict=True)]
        velocity = velocities[0] if len(velocities) == 1 else guide(velocities[0], velocities[1], guidance)
        latents = latents + float(times[step + 1] - times[step]) * velocity
    return latents


def _image_tables(
    decoder: DiffusionDecoder, b: Branch, batch: int, count: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    stack = decoder.config.stack
    lengths = b.lengths if len(b.lengths) == batch else b.lengths * batch
    made = {
        n: rope_tables(stack.rope, stack.head_dim, np.arange(n + 1, n + 1 + count), n + 1 + count) for n in set(lengths)
    }
    cos, sin = (torch.from_numpy(np.stack([made[n][i] for n in lengths])).to(device) for i in (0, 1))
    longest = b.keys[0].shape[2]
    real = torch.arange(longest, device=device) < torch.tensor(lengths, device=device)[:, None]
    mask = torch.cat([real, torch.ones(batch, 1 + count, dtype=torch.bool, device=device)], 1)
    return cos, sin, mask[:, None, None, :]


def _velocity(
    decoder: DiffusionDecoder,
    b: Branch,
    tables: tuple[Tensor, Tensor, Tensor],
    step: int,
    latents: Tensor,
    positions: Tensor,
) -> Tensor:
    cos, sin, mask = tables
    batch = len(latents)
    dtype = decoder.x_embedder.proj.weight.dtype

    def attend_in(layer: int) -> Attend:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            time = slice(step, step + 1)
            before_k = [b.keys[layer], b.time_keys[layer][:, :, time]]
            before_v = [b.values[layer], b.time_values[layer][:, :, time]]
            keys = torch.cat([*(t.expand(batch, -1, -1, -1) for t in before_k), k], 2)
            values = torch.cat([*(t.expand(batch, -1, -1, -1) for t in before_v), v], 2)
            return attention(q, keys, values, mask=mask)

        return attend

    x = decoder.x_embedder(latents.to(dtype)) + positions.to(dtype)
    for index, layer in enumerate(decoder.llm.layers):
        x = layer(x, cos, sin, attend_in(index))
    return decoder._velocity(x, b.modulation[step], *latents.shape[-2:]).float()


@torch.no_grad()
def decode(contexts: Contexts, latents: Tensor) -> NDArray[np.uint8]:
    """Latents (B, 4, h, w) -> images (B, H, W, 3), truncated as the pipeline does; a megapixel at a time."""
    config, vae = contexts.config.vae, contexts.model.vae
    scaled = (latents.float() / config.scaling_factor + config.shift_factor).to(vae.post_quant_conv.weight.dtype)
    pixels = latents.shape[-2] * latents.shape[-1] * config.downscale**2
    decoded = torch.cat([vae.decode(part) for part in scaled.split(max(1, 2**20 // pixels))])
    images = decoded.float().mul(0.5).add(0.5).clamp(0, 1).permute(0, 2, 3, 1)
    return (images * 255).to(torch.uint8).cpu().numpy()


@torch.no_grad()
def paint_contexts(
    contexts: Contexts,
    conversations: Sequence[Context],
    noise: Tensor,
    steps: int,
    guidance: float = 1.0,
    negative: Context | None = None,
) -> Tensor:
    """Conversations → states → condition → latents, with guidance against one negative conversation."""
    tokens = noise.shape[-2] * noise.shape[-1] // contexts.config.decoder.patch_size**2
    branches = []
    for group in ([*conversations], [negative] if negative is not None and guidance != 1 else []):
        if group:
            batch = contexts.batch(group)
            condition, spans = contexts.condition(batch, contexts.states(batch))
            branches.append(branch(contexts.model.decoder, condition, batch.lengths, spans, steps, tokens))
    return paint(contexts, branches[0], noise, steps, branches[1] if len(branches) > 1 else None, guidance)
