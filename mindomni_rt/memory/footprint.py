"""Bytes of weights, caches and activations of each stage, free of torch. `planner` decides what to keep loaded.

Activations follow the reference backend's code, tensor by tensor; the tests hold the sum against measured peaks.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from ..checkpoint.config import ModelConfig, StackConfig, VAEConfig
from ..stages import PART_OF, STAGES, VAE_TILE
from .layers import Layer, Workload, parameters, vae_decoder, vae_encoder
from .precision import BITS, COMPUTE
from .precision import Precision as Precision

LEAST_CAPACITY = 512  # tokens of the fast path's buffers
STEP_CACHE = 3  # copies of the image tokens' states that a request with a step cache adds
UNPACKED = 64_000_000  # bytes of a packed weight that products with many rows unpack at once


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """Bytes while one stage runs. weights: of its own part; state: what it holds for later (K/V, hidden states) and
    what earlier stages left for it; activations: its largest set of intermediate tensors.

    held: what stays in other stages for as long as the part's weights do, the next request's included: buffers that
    never move and the memory of captured graphs.
    """

    stage: str
    weights: int
    state: int
    activations: int
    held: int = 0


def capacity(tokens: int) -> int:
    """Tokens that the fast path makes room for when a request has this many.

    The least, then four sizes to each doubling: few requests make buffers anew, and a quarter is unused at most.
    """
    if tokens <= LEAST_CAPACITY:
        return LEAST_CAPACITY
    step = (1 << (tokens - 1).bit_length()) // 8
    return -(-tokens // step) * step


def weight_bytes(config: ModelConfig, precision: Precision) -> dict[str, int]:
    """Bytes of each part's weights. Norms, biases and the small layers stay in the compute type.

    A head that shares its matrix with the input table is a matrix of its own once it is rounded.
    """
    found = {}
    compute = COMPUTE[precision.compute]
    for part, count in parameters(config).items():
        linear = {"language": precision.language, "decoder": precision.decoder}.get(part, precision.compute)
        rest = COMPUTE[precision.vae] if part == "vae" else compute
        table = COMPUTE[precision.embedding] if part == "language" else rest
        tied = part == "language" and config.language.tie_embeddings and precision.head not in COMPUTE
        head = count.embedding if tied else count.head
        size = count.linear * BITS[linear] / 8 + count.other * rest + count.embedding * table
        found[part] = round(size + head * BITS[precision.head] / 8)
    return found


def _kv(stack: StackConfig, tokens: int, element: int) -> int:
    return 2 * stack.num_layers * stack.num_kv_heads * stack.head_dim * tokens * element


def _block(stack: StackConfig, rows: int, element: int, gated: bool = False) -> int:
    """The larger of a block's two halves: x, its copy in the caller, its norm, then four tensors of the MLP's width;
    or QKV, rotated Q and K with their halves, and the attention's output. gated: gate and up are one tensor, and
    there is no other between it and the product."""
    width, key = stack.hidden_size, stack.num_kv_heads * stack.head_dim
    mlp = 3 * width + (3 if gated else 4) * stack.intermediate_size
    attention = 3 * width + (width + 2 * key) + 2 * (width + key) + width
    return rows * max(mlp, attention) * element


def _vision(config: ModelConfig, work: Workload, element: int) -> int:
    vision, rows = config.vision, work.patches[0] * work.patches[1]
    side = vision.window_size // vision.patch_size
    slots = -(-work.patches[0] // side) * -(-work.patches[1] // side) * side**2 if rows else 0
    mlp = 3 * vision.hidden_size + 4 * vision.intermediate_size
    # q, k, v in windows beside the ones they were taken from, and a mask for each slot.
    attention = rows * 9 * vision.hidden_size + slots * 4 * vision.hidden_size
    return max(rows * mlp, attention) * element + rows * vision.patch_dim * (4 + element) + slots * side**2 * 5


def _language(config: ModelConfig, work: Workload, element: int, kind: str) -> tuple[int, int, int]:
    """(hidden states and cache, activations of the prefill, what a graph of one token holds).

    joint: the cache is rounded up, beside it are the tables of the tokens' choice.
    """
    language = config.language
    stack, room = language.stack, work.condition_tokens
    if work.joint:
        room = capacity(work.room_tokens)
    state = _kv(stack, room, element) + room * stack.hidden_size * element
    logits = language.vocab_size * (element + 4 + 8 + 8)
    graph = 0
    if work.joint:
        state += language.vocab_size * 9 + room * (stack.head_dim * 4 + 16)
        graph = 2 * logits + 8 * stack.intermediate_size * element
    rows = max(work.prompt_tokens, work.negative_tokens)
    return state, _block(stack, rows, element, gated=work.joint) + logits + _unpacked(kind, work), graph


def _unpacked(kind: str, work: Workload) -> int:
    """Weights that the fast path unpacks for many rows."""
    return UNPACKED if work.joint and kind in ("int8wo", "int4") else 0


def _prefix(config: ModelConfig, length: int, work: Workload, element: int) -> tuple[int, int]:
    """(K/V that stay, what the pass needs besides): all layers' K/V stand twice while they are sorted by step.

    joint: each layer's go to their place at once.
    """
    stack = config.decoder.stack
    rows = length + work.steps
    kept = _kv(stack, rows, element) + work.steps * 2 * stack.hidden_size * element
    gathered = 2 * _kv(stack, rows, element) + rows * stack.hidden_size * stack.num_layers * element
    mask = rows**2 * 5
    if work.joint:
        return kept, _block(stack, rows, element) + mask
    return kept, max(_block(stack, rows, element) + _kv(stack, rows, element), gathered) + mask


def _denoiser(config: ModelConfig, work: Workload, element: int) -> int:
    """One step's block, every branch's K/V buffer of one layer, positions, and latents in float32.

    joint: rows of all branches in one block, and their conditions' K/V of all layers copied side by side instead; the
    step cache, which a request may ask for, is counted.
    """
    stack, rows = config.decoder.stack, work.image_tokens * work.images
    if work.joint:
        rows *= len(work.branches)
        buffers = len(work.branches) * _kv(stack, capacity(max(work.branches)), element)
        buffers += STEP_CACHE * rows * stack.hidden_size * element
    else:
        buffers = sum(
            2 * stack.num_kv_heads * stack.head_dim * (length + 1 + work.image_tokens) * work.images * element
            for length in work.branches
        )
    latents = 6 * work.images * config.decoder.latent_channels * (work.height // 8) * (work.width // 8) * 4
    tables = work.image_tokens * (stack.hidden_size * element + len(work.branches) * stack.head_dim * 4)
    return _block(stack, rows, element) + buffers + latents + tables


def _vae(vae: VAEConfig, work: Workload, element: int, parked: bool) -> int:
    """The larger of both ways. Of the encoder, which has one picture: its largest step, the input of its widest level
    and the pixels in float32."""
    decoded = _vae_decoder(vae, work, element, parked)
    height, width = work.encoded
    if not height:
        return decoded
    places = height * width
    step = _largest(vae_encoder(vae, height, width)) + places * vae.block_out_channels[0]
    return max(decoded, step * element + places * vae.in_channels * (4 + element))


def _largest(layers: list[Layer]) -> int:
    return max(_layer(layer, following) for layer, following in pairwise(layers))


def _vae_decoder(vae: VAEConfig, work: Workload, element: int, parked: bool) -> int:
    """The largest step of the decoder: a layer's input and output, the residual kept beside them, and a copy of input
    and output in the layout that the convolution wants; pixels of all images in float32."""
    scale = vae.downscale
    height, width = (min(side, VAE_TILE * scale) for side in (work.height, work.width))
    largest = _largest(vae_decoder(vae, height, width))
    pixels = work.images * work.height * work.width * vae.out_channels * 4
    if max(work.height, work.width) <= VAE_TILE * scale:
        return largest * element + 3 * pixels
    return largest * element + 5 * pixels + (_parked(vae, work, element) if parked else 0)


def _parked(vae: VAEConfig, work: Workload, element: int) -> int:
    """Input and output of the decoder's largest layer for a whole picture, which stripes keep in memory of the host.
    One picture is decoded at a time."""
    return sum(vae.block_out_channels[:2]) * work.height * work.width * element


def _layer(layer: Layer, following: Layer) -> int:
    places = layer.height * layer.width
    if layer.kind == "norm":  # x, its norm, the SiLU of it
        return 3 * places * layer.inputs
    if layer.kind == "attention":
        return 6 * places * layer.inputs
    kept = layer.inputs if following.kind == "norm" else 0
    return places * (2 * layer.inputs + layer.outputs + kept)


def stage_memory(
    config: ModelConfig, work: Workload, precision: Precision, *, parked: bool = False
) -> tuple[StageMemory, ...]:
    """Bytes of each stage on its device, in order.

    parked: what the VAE keeps of a large picture between layers is here: the device is the host, or a GPU without a
    budget. Bundles run tiles instead.
    """
    element = COMPUTE[precision.compute]
    weights = weight_bytes(config, precision)
    lengths = [n for n in work.branches if n]
    stack, hidden = config.decoder.stack, config.language.stack.hidden_size
    merged = work.patches[0] * work.patches[1] // config.vision.merge_size**2
    language, prefill, token = _language(config, work, element, precision.language)
    embeds = merged * hidden * element
    connector = config.connector.stack
    longest = max(lengths)
    passes = [_prefix(config, n, work, element) for n in lengths]
    kept = sum(k for k, _ in passes)
    latents = work.images * config.decoder.latent_channels * (work.height // 8) * (work.width // 8) * 4
    conditions = longest * (stack.hidden_size + hidden) * element
    unpacked, step = _unpacked(precision.decoder, work), _denoiser(config, work, element)
    said = language + token + embeds
    rows = {
        "vision": (embeds, _vision(config, work, element)),
        "language": (said, prefill),
        "connector": (said + conditions, _block(connector, longest, element)),
        "prefix": (said + conditions + kept, max(extra for _, extra in passes) + unpacked),
        "denoiser": (kept + latents, step + unpacked),
        "vae": (kept + latents, _vae(config.vae, work, COMPUTE[precision.vae], parked)),
    }
    held = {"language": language + token, "denoiser": step + unpacked} if work.joint else {}
    return tuple(
        StageMemory(stage=s, weights=weights[PART_OF[s]], state=rows[s][0], activations=rows[s][1], held=held.get(s, 0))
        for s in STAGES
    )
