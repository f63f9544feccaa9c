"""A small untrained model in the published layout: configuration, word-level tokenizer, chat template, weights.

The architecture is the published one at small sizes. Each fixed text of the prompts (system, instruction, default
negative prompt) is one token here, so that contexts stay short on a CPU.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mindomni_rt.checkpoint.config import (
    ConnectorConfig,
    DecoderConfig,
    GenerationConfig,
    ImageConfig,
    LanguageConfig,
    ModelConfig,
    RecommendedConfig,
    RopeConfig,
    StackConfig,
    VAEConfig,
    VisionConfig,
)
from mindomni_rt.files import write_text
from mindomni_rt.inputs.prompts import DEFAULT_NEGATIVE, INSTRUCTION, LATENT_TOKEN, SYSTEM, SYSTEM_THINK
from mindomni_rt.model.mindomni import MindOmniModel
from mindomni_rt.outputs import write_atomic

from .data.world.scene import SIDE
from .outputs import save_checkpoint

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", LATENT_TOKEN,
    "<img>", "</img>", "<|image_1|>", "<unk>", "<cfg>", SYSTEM, SYSTEM_THINK, INSTRUCTION, DEFAULT_NEGATIVE,
)  # fmt: skip
PLAIN = ("<think>", "</think>", "<answer>", "</answer>")  # decoded text shows these, so they are no special tokens
_SPLIT = r"</?\w+>|[a-zA-Z]+|\d|[^\w\s]"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def fresh_config(vocab_size: int, vae: VAEConfig, width: int = 128, connector_layers: int = 2) -> ModelConfig:
    """The small model's sizes for a vocabulary; width is the hidden size of language model and decoder."""
    rope = RopeConfig(kind="plain", theta=10000.0, original_max_positions=1024, max_positions=1024)
    stack: dict[str, Any] = dict(
        hidden_size=width, num_heads=4, num_kv_heads=4, intermediate_size=5 * width // 2, rms_norm_eps=1e-5, rope=rope
    )
    head = width // 4 // 2
    sections = (head // 4, (head - head // 4) // 2, head - head // 4 - (head - head // 4) // 2)
    return ModelConfig(
        vision=VisionConfig(
            hidden_size=width // 2,
            num_layers=2,
            num_heads=4,
            intermediate_size=width,
            out_hidden_size=width,
            window_size=84,
        ),
        language=LanguageConfig(
            stack=StackConfig(
                hidden_size=width,
                num_layers=3,
                num_heads=4,
                num_kv_heads=2,
                intermediate_size=3 * width,
                rms_norm_eps=1e-6,
                qkv_bias=True,
                rope=RopeConfig(
                    kind="mrope", theta=10000.0, mrope_section=sections, original_max_positions=1024, max_positions=1024
                ),
            ),
            vocab_size=vocab_size,
            max_positions=1024,
            image_token_id=SPECIAL.index("<|image_pad|>"),
            vision_start_token_id=SPECIAL.index("<|vision_start|>"),
            vision_end_token_id=SPECIAL.index("<|vision_end|>"),
        ),
        connector=ConnectorConfig(
            input_size=width, stack=StackConfig(num_layers=connector_layers, fused=True, **stack)
        ),
        decoder=DecoderConfig(stack=StackConfig(num_layers=4, fused=True, **stack), text_vocab_size=vocab_size),
        vae=vae,
        image=ImageConfig(min_pixels=56 * 56, max_pixels=112 * 112),
        generation=GenerationConfig(eos_token_ids=(SPECIAL.index("<|im_end|>"), SPECIAL.index("<|endoftext|>"))),
        edit_features="vit+vae",
        recommended=RecommendedConfig(
            width=SIDE, height=SIDE, num_inference_steps=10, guidance_scale=1.0, trained_sides=(SIDE, SIDE)
        ),
    )


def write_tokenizer(folder: Path, words: Iterable[str]) -> int:
    """tokenizer.json and the chat template into `folder`; returns the vocabulary's size.

    Text is split into words, digits, tags and punctuation, in lower case; a word outside the vocabulary is `<unk>`.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    found = {w for text in words for w in re.findall(_SPLIT, text.lower())}
    names = [*SPECIAL, *PLAIN, *sorted({"system", "user", "assistant", *found} - {*SPECIAL, *PLAIN})]
    vocabulary = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_SPLIT), "removed", invert=True)
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)  # joins with spaces, none before punctuation
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in SPECIAL])
    tokenizer.add_tokens([AddedToken(name, normalized=False, special=False) for name in PLAIN])
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    write_atomic(folder / "tokenizer_config.json", json.dumps({"chat_template": TEMPLATE}, indent=2) + "\n")
    return len(names)


def initialise(model: MindOmniModel, seed: int) -> None:
    """Random weights: torch's own for matrices, small embeddings, a decoder whose first output is zero."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d, nn.GroupNorm)):
            module.reset_parameters()
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.3)
    zeros = [model.decoder.final_layer.linear, model.decoder.final_layer.adaLN_modulation[1]]
    for layer in zeros:
        assert isinstance(layer, nn.Linear)
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


def write_fresh(
    folder: Path, words: Iterable[str], vae: VAEConfig, seed: int = 0, width: int = 128, connector_layers: int = 2
) -> MindOmniModel:
    """A small checkpoint with random weights in `folder`; the caller puts a trained VAE into it."""
    size = write_tokenizer(folder / "mllm", words)
    model = MindOmniModel(fresh_config(size, vae, width, connector_layers))
    initialise(model, seed)
    save_checkpoint(model, folder)
    return model
