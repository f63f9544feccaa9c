"""What each stage is made of, as numbers: matrix products, convolutions, and the sizes that a request gives them.

The memory planner and the cost model both read this module, so weights counted for one are the weights counted for the
other. Everything follows from `ModelConfig`; the tests count the parameters of the modules themselves against it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..checkpoint.config import DecoderConfig, ModelConfig, StackConfig, VAEConfig, VisionConfig
from ..errors import BadRequestError
from ..stages import PART_OF as PART_OF
from ..stages import PARTS as PARTS
from ..stages import STAGES as STAGES

PIXELS_PER_TOKEN = 16  # a side: 8 of the VAE times 2 of the patch


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The sizes of one request. Tokens, pixels, steps.

    prompt_tokens: of the rendered chat, image tokens included. new_tokens: written while thinking (0: no thinking);
    max_new_tokens: for which a GPU's buffers have room from the beginning.
    patches: (rows, columns) of the input image's 14-pixel patches, encoded: (height, width) of its pixels that the VAE
    encodes, (0, 0) for none. guidance: two branches or one. paints: False for a question, which ends with its text.
    joint: both branches in one launch, as the fast path of the torch backend runs them.
    """

    prompt_tokens: int = 100
    new_tokens: int = 201
    negative_tokens: int = 100
    patches: tuple[int, int] = (0, 0)
    height: int = 1024
    width: int = 1024
    steps: int = 50
    images: int = 1
    guidance: bool = True
    joint: bool = False
    encoded: tuple[int, int] = (0, 0)
    paints: bool = True
    max_new_tokens: int = 512

    def __post_init__(self) -> None:
        for name, least in (("prompt_tokens", 1), ("new_tokens", 0), ("negative_tokens", 0), ("steps", 1)):
            if getattr(self, name) < least:
                raise BadRequestError(f"{name} = {getattr(self, name)}: expected at least {least}")
        for name in ("height", "width"):
            side = getattr(self, name)
            if side < PIXELS_PER_TOKEN or side % PIXELS_PER_TOKEN:
                raise BadRequestError(f"{name} = {side}: expected a positive multiple of {PIXELS_PER_TOKEN} pixels")
        if self.images < 1:
            raise BadRequestError(f"images = {self.images}: expected at least 1")

    @property
    def condition_tokens(self) -> int:
        """L of the guided branch: the last sampled token's hidden state is never computed."""
        return self.prompt_tokens + max(self.new_tokens - 1, 0)

    @property
    def room_tokens(self) -> int:
        """Tokens that buffers of the text and of the negative prompt have room for."""
        return max(self.prompt_tokens + max(self.new_tokens, self.max_new_tokens, 1), self.negative_tokens + 1)

    @property
    def image_tokens(self) -> int:
        return (self.height // PIXELS_PER_TOKEN) * (self.width // PIXELS_PER_TOKEN)

    @property
    def branches(self) -> tuple[int, ...]:
        """Condition lengths of the branches that the denoiser runs."""
        return (self.condition_tokens, self.negative_tokens) if self.guidance else (self.condition_tokens,)

    @property
    def stages(self) -> tuple[str, ...]:
        """Those that the request runs, each once, in `STAGES`' order."""
        left_out = set() if self.patches[0] else {"vision"}
        left_out |= set() if self.paints else {stage for stage in STAGES if stage not in ("vision", "language")}
        return tuple(stage for stage in STAGES if stage not in left_out)


BUDGETED = Workload(prompt_tokens=256, joint=True)
"""The request by whose room a GPU's memory budget decides what stays loaded, and how exact. With the system prompt of
thinking a short request has about 120 tokens (an estimate), so ordinary ones fit; longer ones are checked."""


@dataclass(frozen=True)
class Linear:
    """A matrix product of `inputs` x `outputs` weights."""

    name: str
    inputs: int
    outputs: int
    bias: bool = False

    @property
    def weights(self) -> int:
        return self.inputs * self.outputs

    @property
    def parameters(self) -> int:
        return self.weights + self.outputs * self.bias


def block_linears(stack: StackConfig) -> tuple[Linear, ...]:
    """The four products of one transformer block, fused as a fast runtime runs them."""
    width, head = stack.hidden_size, stack.head_dim
    return (
        Linear("qkv", width, (stack.num_heads + 2 * stack.num_kv_heads) * head, stack.qkv_bias),
        Linear("o", stack.num_heads * head, width),
        Linear("gate_up", width, 2 * stack.intermediate_size),
        Linear("down", stack.intermediate_size, width),
    )


def vision_linears(vision: VisionConfig) -> tuple[Linear, ...]:
    """The products of one block of the vision tower."""
    width = vision.hidden_size
    return (
        Linear("qkv", width, 3 * width, True),
        Linear("o", width, width, True),
        Linear("gate_up", width, 2 * vision.intermediate_size, True),
        Linear("down", vision.intermediate_size, width, True),
    )


def vision_ends(vision: VisionConfig) -> tuple[Linear, Linear, Linear]:
    """Patch embedding (one row a patch) and the merger's two products (one row a merged token)."""
    merged = vision.hidden_size * vision.merge_size**2
    return (
        Linear("patch_embed", vision.patch_dim, vision.hidden_size),
        Linear("merger.0", merged, merged, True),
        Linear("merger.2", merged, vision.out_hidden_size, True),
    )


@dataclass(frozen=True)
class Layer:
    """One layer of the VAE at the size of its output. kind: conv, norm, linear or attention."""

    kind: str
    inputs: int
    outputs: int
    height: int
    width: int
    kernel: int = 1

    @property
    def parameters(self) -> int:
        if self.kind == "norm":
            return 2 * self.outputs
        return 0 if self.kind == "attention" else self.kernel**2 * self.inputs * self.outputs + self.outputs

    @property
    def flops(self) -> int:
        """Two for each multiply-add; norms count as none."""
        places = self.height * self.width
        if self.kind == "attention":
            return 4 * places**2 * self.outputs
        return 0 if self.kind == "norm" else 2 * places * self.kernel**2 * self.inputs * self.outputs


def _resnet(inputs: int, outputs: int, h: int, w: int) -> Iterator[Layer]:
    yield Layer("norm", inputs, inputs, h, w)
    yield Layer("conv", inputs, outputs, h, w, 3)
    yield Layer("norm", outputs, outputs, h, w)
    yield Layer("conv", outputs, outputs, h, w, 3)
    if inputs != outputs:
        yield Layer("conv", inputs, outputs, h, w, 1)


def _middle(width: int, h: int, w: int) -> Iterator[Layer]:
    yield from _resnet(width, width, h, w)
    yield Layer("norm", width, width, h, w)
    for _ in range(3):
        yield Layer("linear", width, width, h, w)
    yield Layer("attention", width, width, h, w)
    yield Layer("linear", width, width, h, w)
    yield from _resnet(width, width, h, w)


def vae_decoder(vae: VAEConfig, height: int, width: int) -> list[Layer]:
    """Layers of the decoder for an image of height x width pixels, in order."""
    h, w = height // vae.downscale, width // vae.downscale
    widths, latent = vae.block_out_channels[::-1], vae.latent_channels
    layers = [Layer("conv", latent, latent, h, w), Layer("conv", latent, widths[0], h, w, 3)]
    layers += _middle(widths[0], h, w)
    for index, (before, channels) in enumerate(zip((widths[0], *widths[:-1]), widths, strict=True)):
        for position in range(vae.layers_per_block + 1):
            layers += _resnet(channels if position else before, channels, h, w)
        if index < len(widths) - 1:
            h, w = 2 * h, 2 * w
            layers.append(Layer("conv", channels, channels, h, w, 3))
    return [*layers, Layer("norm", widths[-1], widths[-1], h, w), Layer("conv", widths[-1], vae.out_channels, h, w, 3)]


def vae_encoder(vae: VAEConfig, height: int, width: int) -> list[Layer]:
    """Layers of the encoder for an image of height x width pixels, in order."""
    h, w = height, width
    widths, moments = vae.block_out_channels, 2 * vae.latent_channels
    layers = [Layer("conv", vae.in_channels, widths[0], h, w, 3)]
    for index, (before, channels) in enumerate(zip((widths[0], *widths[:-1]), widths, strict=True)):
        for position in range(vae.layers_per_block):
            layers += _resnet(channels if position else before, channels, h, w)
        if index < len(widths) - 1:
            h, w = h // 2, w // 2
            layers.append(Layer("conv", channels, channels, h, w, 3))
    layers += _middle(widths[-1], h, w)
    layers.append(Layer("norm", widths[-1], widths[-1], h, w))
    return [*layers, Layer("conv", widths[-1], moments, h, w, 3), Layer("conv", moments, moments, h, w)]


@dataclass(frozen=True)
class Parameters:
    """Parameters of one part: linear (what quantization shrinks), head, embedding, and the rest."""

    linear: int
    other: int
    head: int = 0
    embedding: int = 0

    @property
    def total(self) -> int:
        return self.linear + self.other + self.head + self.embedding


def _stack_parameters(stack: StackConfig) -> tuple[int, int]:
    """(weights of the products, biases and norms) of all blocks."""
    linears = block_linears(stack)
    weights = sum(item.weights for item in linears)
    rest = sum(item.parameters for item in linears) - weights + 2 * stack.hidden_size
    return weights * stack.num_layers, rest * stack.num_layers


def _decoder_parameters(decoder: DecoderConfig) -> Parameters:
    weights, rest = _stack_parameters(decoder.stack)
    width, patch = decoder.stack.hidden_size, decoder.patch_size**2 * decoder.latent_channels
    embed = 2 * (patch * width + width)
    times = 2 * (decoder.time_frequencies * width + width + width**2 + width)
    final = width * patch + patch + width * 2 * width + 2 * width
    text = decoder.text_vocab_size * width
    return Parameters(weights, rest + width + embed + times + final, embedding=text)


def parameters(config: ModelConfig) -> dict[str, Parameters]:
    """Parameters of each of the five parts, encoder of the VAE included."""
    vision, language, connector = config.vision, config.language, config.connector
    block = vision_linears(vision)
    weights = sum(item.weights for item in block)
    ends = vision_ends(vision)
    norms = 2 * vision.hidden_size * vision.num_layers + vision.hidden_size
    biases = (sum(item.parameters for item in block) - weights) * vision.num_layers
    biases += sum(item.parameters - item.weights for item in ends)
    body, rest = _stack_parameters(language.stack)
    table = language.vocab_size * language.stack.hidden_size
    inner, connector_rest = _stack_parameters(connector.stack)
    first = Linear("in", connector.input_size, connector.stack.hidden_size, True)
    vae = sum(layer.parameters for layer in vae_decoder(config.vae, 64, 64) + vae_encoder(config.vae, 64, 64))
    return {
        "vision": Parameters(weights * vision.num_layers + sum(item.weights for item in ends), norms + biases),
        "language": Parameters(
            body, rest + language.stack.hidden_size, head=0 if language.tie_embeddings else table, embedding=table
        ),
        "connector": Parameters(first.weights + inner, connector_rest + first.outputs),
        "decoder": _decoder_parameters(config.decoder),
        "vae": Parameters(0, vae),
    }
