"""Names and shapes of every tensor of a checkpoint, from the configuration alone: no torch, no weights.

The names are those of the model's modules; the tests hold the two against each other.
"""

from __future__ import annotations

from collections.abc import Iterator

from ...checkpoint.config import (
    ConnectorConfig,
    DecoderConfig,
    LanguageConfig,
    ModelConfig,
    StackConfig,
    VAEConfig,
    VisionConfig,
)

Shape = tuple[int, ...]
Named = Iterator[tuple[str, Shape]]


def tensor_shapes(config: ModelConfig) -> dict[str, dict[str, Shape]]:
    """Shapes by part and canonical name, in the order of the modules."""
    return {
        "vision": dict(_vision(config.vision)),
        "language": dict(_language(config.language)),
        "connector": dict(_connector(config.connector)),
        "decoder": dict(_decoder(config.decoder)),
        "vae": dict(_vae(config.vae)),
    }


def _linear(name: str, inputs: int, outputs: int, bias: bool = True) -> Named:
    yield f"{name}.weight", (outputs, inputs)
    if bias:
        yield f"{name}.bias", (outputs,)


def _block(name: str, stack: StackConfig) -> Named:
    """One block of the language model (separate projections) or of the decoder (fused ones)."""
    width, inner = stack.hidden_size, stack.intermediate_size
    heads, keys = stack.num_heads * stack.head_dim, stack.num_kv_heads * stack.head_dim
    yield f"{name}.input_layernorm.weight", (width,)
    if stack.fused:
        yield from _linear(f"{name}.self_attn.qkv_proj", width, heads + 2 * keys, stack.qkv_bias)
    else:
        for key, outputs in (("q_proj", heads), ("k_proj", keys), ("v_proj", keys)):
            yield from _linear(f"{name}.self_attn.{key}", width, outputs, stack.qkv_bias)
    yield from _linear(f"{name}.self_attn.o_proj", heads, width, False)
    yield f"{name}.post_attention_layernorm.weight", (width,)
    if stack.fused:
        yield from _linear(f"{name}.mlp.gate_up_proj", width, 2 * inner, False)
    else:
        yield from _linear(f"{name}.mlp.gate_proj", width, inner, False)
        yield from _linear(f"{name}.mlp.up_proj", width, inner, False)
    yield from _linear(f"{name}.mlp.down_proj", inner, width, False)


def _vision(vision: VisionConfig) -> Named:
    width, inner, patch = vision.hidden_size, vision.intermediate_size, vision.patch_size
    merged = width * vision.merge_size**2
    yield "patch_embed.proj.weight", (width, vision.in_channels, vision.temporal_patch_size, patch, patch)
    for layer in range(vision.num_layers):
        name = f"blocks.{layer}"
        yield f"{name}.norm1.weight", (width,)
        yield f"{name}.norm2.weight", (width,)
        yield from _linear(f"{name}.attn.qkv", width, 3 * width)
        yield from _linear(f"{name}.attn.proj", width, width)
        yield from _linear(f"{name}.mlp.gate_proj", width, inner)
        yield from _linear(f"{name}.mlp.up_proj", width, inner)
        yield from _linear(f"{name}.mlp.down_proj", inner, width)
    yield "merger.ln_q.weight", (width,)
    yield from _linear("merger.mlp.0", merged, merged)
    yield from _linear("merger.mlp.2", merged, vision.out_hidden_size)


def _language(language: LanguageConfig) -> Named:
    width = language.stack.hidden_size
    yield "embed_tokens.weight", (language.vocab_size, width)
    for layer in range(language.stack.num_layers):
        yield from _block(f"layers.{layer}", language.stack)
    yield "norm.weight", (width,)
    if not language.tie_embeddings:
        yield "lm_head.weight", (language.vocab_size, width)


def _connector(connector: ConnectorConfig) -> Named:
    yield from _linear("0", connector.input_size, connector.stack.hidden_size)
    for layer in range(connector.stack.num_layers):
        yield from _block(f"{layer + 1}", connector.stack)


def _decoder(decoder: DecoderConfig) -> Named:
    width, patch = decoder.stack.hidden_size, decoder.patch_size
    for name in ("x_embedder", "input_x_embedder"):
        yield f"{name}.proj.weight", (width, decoder.latent_channels, patch, patch)
        yield f"{name}.proj.bias", (width,)
    for name in ("time_token", "t_embedder"):
        yield from _linear(f"{name}.mlp.0", decoder.time_frequencies, width)
        yield from _linear(f"{name}.mlp.2", width, width)
    if decoder.text_vocab_size:
        yield "llm.embed_tokens.weight", (decoder.text_vocab_size, width)
    for layer in range(decoder.stack.num_layers):
        yield from _block(f"llm.layers.{layer}", decoder.stack)
    yield "llm.norm.weight", (width,)
    yield from _linear("final_layer.linear", width, patch**2 * decoder.latent_channels)
    yield from _linear("final_layer.adaLN_modulation.1", width, 2 * width)


def _conv(name: str, inputs: int, outputs: int, kernel: int = 3) -> Named:
    yield f"{name}.weight", (outputs, inputs, kernel, kernel)
    yield f"{name}.bias", (outputs,)


def _norm(name: str, width: int) -> Named:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def _resnet(name: str, inputs: int, outputs: int) -> Named:
    yield from _norm(f"{name}.norm1", inputs)
    yield from _conv(f"{name}.conv1", inputs, outputs)
    yield from _norm(f"{name}.norm2", outputs)
    yield from _conv(f"{name}.conv2", outputs, outputs)
    if inputs != outputs:
        yield from _conv(f"{name}.conv_shortcut", inputs, outputs, 1)


def _middle(name: str, width: int) -> Named:
    for index in range(2):
        yield from _resnet(f"{name}.resnets.{index}", width, width)
    yield from _norm(f"{name}.attentions.0.group_norm", width)
    for key in ("to_q", "to_k", "to_v", "to_out.0"):
        yield from _linear(f"{name}.attentions.0.{key}", width, width)


def _side(name: str, blocks: str, resample: str, widths: Shape, layers: int) -> Named:
    """The blocks of the encoder or the decoder: `layers` resnets each, all but the last with a resampler."""
    for index, (before, width) in enumerate(zip((widths[0], *widths[:-1]), widths, strict=True)):
        block = f"{name}.{blocks}.{index}"
        for layer in range(layers):
            yield from _resnet(f"{block}.resnets.{layer}", width if layer else before, width)
        if index < len(widths) - 1:
            yield from _conv(f"{block}.{resample}.0.conv", width, width)


def _vae(vae: VAEConfig) -> Named:
    widths, latent = vae.block_out_channels, vae.latent_channels
    yield from _conv("encoder.conv_in", vae.in_channels, widths[0])
    yield from _side("encoder", "down_blocks", "downsamplers", widths, vae.layers_per_block)
    yield from _middle("encoder.mid_block", widths[-1])
    yield from _norm("encoder.conv_norm_out", widths[-1])
    yield from _conv("encoder.conv_out", widths[-1], 2 * latent)
    yield from _conv("decoder.conv_in", latent, widths[-1])
    yield from _middle("decoder.mid_block", widths[-1])
    yield from _side("decoder", "up_blocks", "upsamplers", widths[::-1], vae.layers_per_block + 1)
    yield from _norm("decoder.conv_norm_out", widths[0])
    yield from _conv("decoder.conv_out", widths[0], vae.out_channels)
    yield from _conv("quant_conv", 2 * latent, 2 * latent, 1)
    yield from _conv("post_quant_conv", latent, latent, 1)
