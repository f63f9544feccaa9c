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

from mindomni_rt.backends.torch.denoise import Branch, TorchDenoiseSession
from mindomni_rt.backends.torch.language import sample
from mindomni_rt.inputs.positions import image_positions, image_tables, prefix_tables, rope_tables
from mindomni_rt.model.attention import LayerAttend, attention
from mindomni_rt.model.cache import StaticCache
from mindomni_rt.model.decoder import DiffusionDecoder, PrefixKV, Span
from mindomni_rt.sampling.denoise import run_steps
from mindomni_rt.sampling.schedule import plan_steps, timesteps

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
        x = model.layers(x, *tables, _over_cache(cache, start, mask))
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


def _over_cache(cache: StaticCache, start: int, mask: Tensor) -> LayerAttend:
    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
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
    uniform = torch.rand(len(logits), 1, generator=generator, dtype=torch.float64).to(logits.device)
    return sample(logits, temperature, uniform).squeeze(-1)


@dataclass(frozen=True)
class Prefixes:
    """A batch of prefixes: K/V of conditions padded on the right to the longest, AdaLN (T, 2C), real lengths."""

    kv: PrefixKV
    modulation: Tensor
    lengths: list[int]


@torch.no_grad()
def prefixes(
    decoder: DiffusionDecoder,
    condition: Tensor,
    lengths: Sequence[int],
    spans: Sequence[Sequence[Span]],
    steps: int,
    image_tokens: int,
) -> Prefixes:
    """The prefix pass of a padded batch: condition (B, L, C) and the time tokens of all steps."""
    rows = [
        prefix_tables(decoder.config, length, timesteps(steps)[:-1], image_tokens, blocks, padded=condition.shape[1])
        for length, blocks in zip(lengths, spans or [()] * len(lengths), strict=True)
    ]
    cos, sin, visible = (
        torch.from_numpy(np.stack([getattr(row, name) for row in rows])).to(condition.device)
        for name in ("cos", "sin", "visible")
    )
    features = torch.from_numpy(rows[0].features).to(condition.device, decoder.x_embedder.proj.weight.dtype)
    kv = decoder.prefix(condition, features, cos, sin, visible.unsqueeze(1))
    return Prefixes(kv, decoder.modulation(features), list(lengths))


@torch.no_grad()
def paint(
    contexts: Contexts,
    guided: Prefixes,
    noise: Tensor,
    steps: int,
    unguided: Prefixes | None = None,
    guidance: float = 1.0,
) -> Tensor:
    """Euler from noise (B, 4, h, w) to latents. unguided may be a batch of one."""
    decoder, latents = contexts.model.decoder, noise.to(contexts.device).float()
    patch = decoder.config.patch_size
    rows, columns = latents.shape[-2] // patch, latents.shape[-1] // patch
    grid = torch.from_numpy(image_positions(decoder.config, rows, columns)).to(contexts.device)
    batches = [guided] if unguided is None or guidance == 1 else [guided, unguided]
    session = TorchDenoiseSession([_branch(decoder, b, len(latents), grid) for b in batches], latents, torch.no_grad)
    for _ in run_steps(session, plan_steps(timesteps(steps), len(batches), guidance)):
        pass
    return session.latents


def _branch(decoder: DiffusionDecoder, batch: Prefixes, count: int, positions: Tensor) -> Branch:
    """A batch of prefixes, or one for all, with the tables of `count` images."""
    device, lengths = positions.device, batch.lengths if len(batch.lengths) == count else batch.lengths * count
    made = {n: image_tables(decoder.config, n, len(positions)) for n in set(lengths)}
    cos, sin = (torch.from_numpy(np.stack([made[n][i] for n in lengths])).to(device) for i in (0, 1))
    real = torch.arange(batch.kv.length, device=device) < torch.tensor(lengths, device=device)[:, None]
    rest = torch.ones(count, 1 + len(positions), dtype=torch.bool, device=device)
    return Branch(
        decoder=decoder,
        prefix=batch.kv,
        modulation=batch.modulation,
        cos=cos,
        sin=sin,
        positions=positions,
        mask=torch.cat([real, rest], 1)[:, None, None, :],
    )


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
    batches = []
    for group in ([*conversations], [negative] if negative is not None and guidance != 1 else []):
        if group:
            batch = contexts.batch(group)
            condition, spans = contexts.condition(batch, contexts.states(batch))
            batches.append(prefixes(contexts.model.decoder, condition, batch.lengths, spans, steps, tokens))
    return paint(contexts, batches[0], noise, steps, batches[1] if len(batches) > 1 else None, guidance)
