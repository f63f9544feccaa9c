"""Bytes of weights, caches and activations of each stage, free of torch. `planner` decides what to keep loaded.

Activations follow the reference backend's code, tensor by tensor; the tests hold the sum against measured peaks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

from ..checkpoint.config import ModelConfig, StackConfig, VAEConfig
from ..errors import BadRequestError
from .layers import PART_OF, STAGES, Layer, Workload, parameters, vae_decoder

# Bits a weight, scales included: 4.25 is one 16-bit scale and zero for 128 weights, 4.5 one 8-bit scale for 16.
BITS = {"float32": 32, "bfloat16": 16, "float16": 16, "fp8": 8, "int8": 8, "int4": 4.25, "nvfp4": 4.5}
COMPUTE = {"float32": 4, "bfloat16": 2, "float16": 2}
VAE_TILE = 128  # latents a side that are decoded whole


@dataclass(frozen=True, kw_only=True)
class Precision:
    """How weights are stored and what is computed in. head: of the output embedding; vae: weights and activations."""

    compute: str = "bfloat16"
    language: str = "bfloat16"
    decoder: str = "bfloat16"
    head: str = "bfloat16"
    vae: str = "float32"

    def __post_init__(self) -> None:
        tables: dict[str, Iterable[str]] = {
            "compute": COMPUTE,
            "vae": COMPUTE,
            "language": BITS,
            "decoder": BITS,
            "head": BITS,
        }
        for name, table in tables.items():
            if getattr(self, name) not in table:
                raise BadRequestError(f"{name} precision {getattr(self, name)!r}: expected one of {', '.join(table)}")

    @classmethod
    def uniform(cls, dtype: str, vae: str = "float32") -> Precision:
        """One type for everything but the VAE, as an unquantized checkpoint runs."""
        return cls(compute=dtype, language=dtype, decoder=dtype, head=dtype, vae=vae)

    @classmethod
    def of_stages(cls, stages: Mapping[str, str], compute: str) -> Precision:
        """From what `export build` calls the precision of each stage; compute: what unquantized parts are in."""
        names = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "int8wo": "int8", "mixed": "float32"}
        language, decoder, vae = (names.get(stages[s], stages[s]) for s in ("language", "denoiser", "vae"))
        head = compute if language in COMPUTE else "int8"
        return cls(compute=compute, language=language, decoder=decoder, head=head, vae=vae)

    def __str__(self) -> str:
        return f"language {self.language}, head {self.head}, decoder {self.decoder}, vae {self.vae}"


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """Bytes while one stage runs. weights: of its own part; state: what it holds for later (K/V, hidden states) and
    what earlier stages left for it; activations: its largest set of intermediate tensors."""

    stage: str
    weights: int
    state: int
    activations: int


def weight_bytes(config: ModelConfig, precision: Precision) -> dict[str, int]:
    """Bytes of each part's weights. Norms, biases, embeddings and the small layers stay in the compute type."""
    found = {}
    compute = COMPUTE[precision.compute]
    for part, count in parameters(config).items():
        linear = {"language": precision.language, "decoder": precision.decoder}.get(part, precision.compute)
        rest = COMPUTE[precision.vae] if part == "vae" else compute
        size = count.linear * BITS[linear] / 8 + (count.other + count.embedding) * rest
        found[part] = round(size + count.head * BITS[precision.head] / 8)
    return found


def _kv(stack: StackConfig, tokens: int, element: int) -> int:
    return 2 * stack.num_layers * stack.num_kv_heads * stack.head_dim * tokens * element


def _block(stack: StackConfig, rows: int, element: int) -> int:
    """The larger of a block's two halves: x, its copy in the caller, its norm, then four tensors of the MLP's width;
    or QKV, rotated Q and K with their halves, and the attention's output."""
    width, key = stack.hidden_size, stack.num_kv_heads * stack.head_dim
    mlp = 3 * width + 4 * stack.intermediate_size
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


def _language(config: ModelConfig, work: Workload, element: int) -> tuple[int, int]:
    """(hidden states and cache, activations of the prefill)."""
    language = config.language
    stack, capacity = language.stack, work.condition_tokens
    state = _kv(stack, capacity, element) + capacity * stack.hidden_size * element
    logits = language.vocab_size * (element + 4 + 8 + 8)
    return state, _block(stack, max(work.prompt_tokens, work.negative_tokens), element) + logits


def _prefix(config: ModelConfig, length: int, work: Workload, element: int) -> tuple[int, int]:
    """(K/V that stay, what the pass needs besides): all layers' K/V stand twice while they are sorted by step."""
    stack = config.decoder.stack
    rows = length + work.steps
    kept = _kv(stack, rows, element) + work.steps * 2 * stack.hidden_size * element
    gathered = 2 * _kv(stack, rows, element) + rows * stack.hidden_size * stack.num_layers * element
    mask = rows**2 * 5
    return kept, max(_block(stack, rows, element) + _kv(stack, rows, element), gathered) + mask


def _denoiser(config: ModelConfig, work: Workload, element: int) -> int:
    """One step's block, every branch's K/V buffer of one layer, positions, and latents in float32.

    joint: rows of all branches in one block, and their conditions' K/V of all layers copied side by side instead.
    """
    stack, rows = config.decoder.stack, work.image_tokens * work.images
    if work.joint:
        rows *= len(work.branches)
        buffers = len(work.branches) * _kv(stack, max(work.branches), element)
    else:
        buffers = sum(
            2 * stack.num_kv_heads * stack.head_dim * (length + 1 + work.image_tokens) * work.images * element
            for length in work.branches
        )
    latents = 6 * work.images * config.decoder.latent_channels * (work.height // 8) * (work.width // 8) * 4
    tables = work.image_tokens * (stack.hidden_size * element + len(work.branches) * stack.head_dim * 4)
    return _block(stack, rows, element) + buffers + latents + tables


def _vae(vae: VAEConfig, work: Workload, element: int) -> int:
    """The largest step of the decoder: a layer's input and output, the residual kept beside them, and a copy of input
    and output in the layout that the convolution wants; pixels of all images in float32."""
    scale = vae.downscale
    height, width = (min(side, VAE_TILE * scale) for side in (work.height, work.width))
    layers = vae_decoder(vae, height, width)
    largest = max(_layer(layer, following) for layer, following in pairwise(layers))
    pixels = work.images * work.height * work.width * vae.out_channels * 4
    tiles = 2 * pixels if max(work.height, work.width) > VAE_TILE * scale else 0
    return largest * element + 3 * pixels + tiles


def _layer(layer: Layer, following: Layer) -> int:
    places = layer.height * layer.width
    if layer.kind == "norm":  # x, its norm, the SiLU of it
        return 3 * places * layer.inputs
    if layer.kind == "attention":
        return 6 * places * layer.inputs
    kept = layer.inputs if following.kind == "norm" else 0
    return places * (2 * layer.inputs + layer.outputs + kept)


def stage_memory(config: ModelConfig, work: Workload, precision: Precision) -> tuple[StageMemory, ...]:
    """Bytes of each stage, in order."""
    element = COMPUTE[precision.compute]
    weights = weight_bytes(config, precision)
    lengths = [n for n in work.branches if n]
    stack, hidden = config.decoder.stack, config.language.stack.hidden_size
    merged = work.patches[0] * work.patches[1] // config.vision.merge_size**2
    language, prefill = _language(config, work, element)
    embeds = merged * hidden * element
    connector = config.connector.stack
    longest = max(lengths)
    passes = [_prefix(config, n, work, element) for n in lengths]
    kept = sum(k for k, _ in passes)
    latents = work.images * config.decoder.latent_channels * (work.height // 8) * (work.width // 8) * 4
    conditions = longest * (stack.hidden_size + hidden) * element
    rows = {
        "vision": (embeds, _vision(config, work, element)),
        "language": (language + embeds, prefill),
        "connector": (language + embeds + conditions, _block(connector, longest, element)),
        "prefix": (language + embeds + conditions + kept, max(extra for _, extra in passes)),
        "denoiser": (kept + latents, _denoiser(config, work, element)),
        "vae": (kept + latents, _vae(config.vae, work, COMPUTE[precision.vae])),
    }
    return tuple(
        StageMemory(stage=s, weights=weights[PART_OF[s]], state=rows[s][0], activations=rows[s][1]) for s in STAGES
    )
