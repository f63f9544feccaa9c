"""What every stage costs: floating-point operations and bytes, from the configuration alone.

Two for each multiply-add. Elementwise work counts no operations, only the elements it moves. Traffic is that of memory
without any reuse in caches between kernels, with the fusions that a good engine makes (norm alone; QKV with RoPE;
SwiGLU and residuals as epilogues); `fused=False` adds the separate RoPE, SwiGLU and residual kernels of an eager run.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..checkpoint.config import ModelConfig, RopeConfig, StackConfig, VisionConfig
from .layers import Layer, Linear, Workload, block_linears, vae_decoder, vision_ends, vision_linears

_NO_ROPE = RopeConfig()


@dataclass(frozen=True, kw_only=True)
class Op:
    """One kind of kernel in a stage, run `repeat` times. Traffic in elements by role, each with its own precision:

    weights, head (the output embedding), operands (between kernels), qkv (attention's), residual (the stream).
    kind: gemm, attention, conv or move; the first three set which peak bounds it.
    """

    name: str
    kind: str
    flops: float = 0.0
    weights: float = 0.0
    head: float = 0.0
    operands: float = 0.0
    qkv: float = 0.0
    residual: float = 0.0
    repeat: int = 1


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """A stage's kernels for one unit of its work, and how many units a request needs (tokens, steps or 1)."""

    name: str
    ops: tuple[Op, ...]
    units: int = 1
    unit: str = "request"

    @property
    def flops(self) -> float:
        """Of one unit."""
        return sum(op.flops * op.repeat for op in self.ops)

    def elements(self, role: str) -> float:
        """Elements moved for one unit in one role."""
        return sum(getattr(op, role) * op.repeat for op in self.ops)


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """A choice of precisions. gemm, attention: which peaks of a device bound them, the best of each tuple;
    the rest: bits an element, scales of quantized groups included."""

    name: str
    gemm: tuple[str, ...]
    attention: tuple[str, ...]
    weights: float
    operands: float
    qkv: float
    residual: float = 16
    head: float = 16
    fused: bool = True

    def bytes(self, op: Op) -> float:
        """Bytes that one run of the kernel moves."""
        return sum(getattr(op, role) * getattr(self, role) / 8 for role in ROLES)


ROLES = ("weights", "head", "operands", "qkv", "residual")
# 4.5 bits: NVFP4, an 8-bit scale for 16 weights. 4.25 bits: 4-bit weights, 16-bit scale and zero for 128.
SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme(name="fp32", gemm=("fp32",), attention=("fp32",), weights=32, operands=32, qkv=32, residual=32, head=32),
        Scheme(name="bf16-eager", gemm=("bf16",), attention=("bf16",), weights=16, operands=16, qkv=16, fused=False),
        Scheme(name="bf16", gemm=("bf16",), attention=("bf16",), weights=16, operands=16, qkv=16),
        Scheme(name="w8a8", gemm=("fp8", "int8"), attention=("bf16",), weights=8, operands=8, qkv=16, head=8),
        Scheme(
            name="w8a8+attn8", gemm=("fp8", "int8"), attention=("fp8", "int8"), weights=8, operands=8, qkv=8, head=8
        ),
        Scheme(
            name="w4a4+attn8",
            gemm=("fp4", "int4"),
            attention=("fp8", "int8"),
            weights=4.5,
            operands=4.5,
            qkv=8,
            head=8,
        ),
        Scheme(name="w4a16", gemm=("bf16",), attention=("bf16",), weights=4.25, operands=16, qkv=16, head=8),
    )
}


def attention_flops(stack: StackConfig, pairs: float) -> float:
    """Both products of attention over (query, key) pairs: 4 for each pair and channel of the query heads."""
    return 4.0 * pairs * stack.num_heads * stack.head_dim


def block_ops(stack: StackConfig, rows: int, keys: int, pairs: float | None = None, fused: bool = True) -> list[Op]:
    """One block over `rows` new tokens that attend to `keys`; pairs None is all of them (no mask)."""
    width, inner, heads = stack.hidden_size, stack.intermediate_size, stack.num_heads * stack.head_dim
    key_width = stack.num_kv_heads * stack.head_dim
    qkv, o, gate_up, down = block_linears(stack)
    pairs = rows * keys if pairs is None else pairs

    def product(linear: Linear, **traffic: Any) -> Op:
        flops = 2.0 * rows * linear.weights
        return Op(name=linear.name, kind="gemm", flops=flops, weights=linear.weights, **traffic)

    norm = Op(name="norm", kind="move", operands=rows * width, residual=rows * width, repeat=2)
    ops = [
        norm,
        product(qkv, operands=rows * width, qkv=rows * qkv.outputs),
        Op(
            name="attention",
            kind="attention",
            flops=attention_flops(stack, pairs),
            operands=rows * heads,
            qkv=rows * heads + 2 * keys * key_width,
        ),
        product(o, operands=rows * heads, residual=2 * rows * width),
        product(gate_up, operands=rows * (width + inner)),
        product(down, operands=rows * inner, residual=2 * rows * width),
    ]
    if not fused:
        ops.append(Op(name="rope", kind="move", qkv=2 * rows * (heads + key_width)))
        ops.append(Op(name="swiglu", kind="move", operands=4 * rows * inner))
        ops.append(Op(name="add", kind="move", residual=2 * rows * width, repeat=2))
    return ops


def _repeat(ops: Iterable[Op], times: int) -> list[Op]:
    return [Op(**{**vars(op), "repeat": op.repeat * times}) for op in ops]


def _product(linear: Linear, rows: int, role: str = "weights") -> Op:
    traffic: dict[str, Any] = {role: float(linear.weights)}
    return Op(
        name=linear.name,
        kind="gemm",
        flops=2.0 * rows * linear.weights,
        operands=rows * (linear.inputs + linear.outputs),
        **traffic,
    )


def vision_cost(config: ModelConfig, patches: tuple[int, int], fused: bool = True) -> StageCost:
    """The tower over rows x columns patches; windows at the edge are padded to whole ones, as they run."""
    vision = config.vision
    rows = patches[0] * patches[1]
    if not rows:
        return StageCost(name="vision", ops=(), units=0)
    side = vision.window_size // vision.patch_size // vision.merge_size * vision.merge_size
    windows = -(-patches[0] // side) * -(-patches[1] // side)
    full = len([i for i in vision.full_attention_layers if i < vision.num_layers])
    embed, first, second = vision_ends(vision)
    merged = rows // vision.merge_size**2
    ops = [_product(embed, rows), _product(first, merged), _product(second, merged)]
    ops += _repeat(_vision_block(vision, rows, float(rows) ** 2, fused), full)
    ops += _repeat(_vision_block(vision, rows, float(windows * side**4), fused), vision.num_layers - full)
    return StageCost(name="vision", ops=tuple(ops))


def _vision_block(vision: VisionConfig, rows: int, pairs: float, fused: bool) -> list[Op]:
    stack = StackConfig(
        hidden_size=vision.hidden_size,
        num_layers=1,
        num_heads=vision.num_heads,
        num_kv_heads=vision.num_heads,
        intermediate_size=vision.intermediate_size,
        rms_norm_eps=vision.rms_norm_eps,
        rope=_NO_ROPE,
    )
    assert sum(i.weights for i in block_linears(stack)) == sum(i.weights for i in vision_linears(vision))
    return block_ops(stack, rows, rows, pairs, fused)


def language_costs(
    config: ModelConfig, prompts: Iterable[int], new_tokens: int, fused: bool = True, causal: bool = True
) -> list[StageCost]:
    """Prefill of each prompt (one logit row each), then decoding new_tokens after the first prompt.

    causal False counts masked pairs too, as a kernel that does not skip them (and torch's counter) does.
    """
    language = config.language
    stack = language.stack
    head = Linear("lm_head", stack.hidden_size, language.vocab_size)
    prefill: list[Op] = []
    lengths = list(prompts)
    for index, length in enumerate(lengths):
        pairs = length * (length + 1) / 2 if causal else float(length) ** 2
        prefill += _repeat(block_ops(stack, length, length, pairs, fused), stack.num_layers)
        if index == 0 and new_tokens:
            prefill.append(_product(head, 1, "head"))
    steps = max(new_tokens - 1, 0)
    # Every decoded token attends to all before it and itself: the mean over the text.
    mean = round(lengths[0] + (steps + 1) / 2) if steps else 0
    decode = [*_repeat(block_ops(stack, 1, mean, None, fused), stack.num_layers), _product(head, 1, "head")]
    return [
        StageCost(name="language.prefill", ops=tuple(prefill)),
        StageCost(name="language.decode", ops=tuple(decode) if steps else (), units=steps, unit="token"),
    ]


def connector_cost(config: ModelConfig, lengths: Iterable[int], fused: bool = True, causal: bool = True) -> StageCost:
    """One pass for each branch."""
    connector = config.connector
    first = Linear("in", connector.input_size, connector.stack.hidden_size)
    ops: list[Op] = []
    for length in lengths:
        pairs = length * (length + 1) / 2 if causal else float(length) ** 2
        blocks = block_ops(connector.stack, length, length, pairs, fused)
        ops += [_product(first, length), *_repeat(blocks, connector.stack.num_layers)]
    return StageCost(name="connector", ops=tuple(ops))


def prefix_cost(
    config: ModelConfig, lengths: Iterable[int], steps: int, fused: bool = True, causal: bool = True
) -> StageCost:
    """K/V of the condition and of all steps' time tokens; of the last layer only K and V (counted as all of QKV)."""
    decoder = config.decoder
    stack, ops = decoder.stack, list[Op]()
    time = [
        Linear("time.0", decoder.time_frequencies, stack.hidden_size),
        Linear("time.2", stack.hidden_size, stack.hidden_size),
    ]
    modulation = [*time, Linear("modulation", stack.hidden_size, 2 * stack.hidden_size)]
    for length in lengths:
        rows = length + steps
        pairs = length * (length + 1) / 2 + steps * (length + 1) if causal else float(rows) ** 2
        blocks = block_ops(stack, rows, rows, pairs, fused)
        ops += _repeat(blocks, stack.num_layers - 1)
        ops += [op for op in blocks if op.name == "qkv"]
        ops += [_product(linear, steps) for linear in (*time, *modulation)]
    return StageCost(name="prefix", ops=tuple(ops))


def denoiser_cost(
    config: ModelConfig, lengths: Iterable[int], image_tokens: int, steps: int = 1, images: int = 1, fused: bool = True
) -> StageCost:
    """One step of all branches. Queries: image tokens; keys: condition, one time token, image tokens."""
    decoder = config.decoder
    patch = decoder.patch_size**2 * decoder.latent_channels
    embed = Linear("x_embedder", patch, decoder.stack.hidden_size)
    final = Linear("final", decoder.stack.hidden_size, patch)
    ops: list[Op] = []
    for length in lengths:
        keys = length + 1 + image_tokens
        blocks = block_ops(
            decoder.stack, image_tokens * images, keys * images, float(images * image_tokens * keys), fused
        )
        ops += _repeat(blocks, decoder.stack.num_layers)
        ops += [_product(embed, image_tokens * images), _product(final, image_tokens * images)]
    return StageCost(name="denoiser", ops=tuple(ops), units=steps, unit="step")


def vae_cost(config: ModelConfig, height: int, width: int, images: int = 1) -> StageCost:
    """Decoding. A norm and its SiLU read and write once; convolutions read their input and write their output."""
    layers = vae_decoder(config.vae, height, width)
    return StageCost(name="vae", ops=tuple(_layer_op(layer) for layer in layers), units=images, unit="image")


def _layer_op(layer: Layer) -> Op:
    places = layer.height * layer.width
    kind = {"norm": "move", "attention": "attention"}.get(layer.kind, "conv")
    moved = 4 * places * layer.outputs if layer.kind == "attention" else places * (layer.inputs + layer.outputs)
    weights = layer.parameters if kind == "conv" else 0
    return Op(name=layer.kind, kind=kind, flops=float(layer.flops), weights=weights, operands=moved)


def request_costs(config: ModelConfig, work: Workload, fused: bool = True, causal: bool = True) -> list[StageCost]:
    """Every stage of one request, in order; `units` says how often each runs."""
    both = (work.prompt_tokens, work.negative_tokens) if work.guidance else (work.prompt_tokens,)
    prompts = tuple(p for p in both if p)
    lengths = tuple(n for n in work.branches if n)
    return [
        vision_cost(config, work.patches, fused),
        *language_costs(config, prompts, work.new_tokens, fused, causal),
        connector_cost(config, lengths, fused, causal),
        prefix_cost(config, lengths, work.steps, fused, causal),
        denoiser_cost(config, lengths, work.image_tokens, work.steps, work.images, fused),
        vae_cost(config, work.height, work.width, work.images),
    ]
