"""A tiny random checkpoint for the demo, until a trained one is there: it runs everything and knows nothing."""

from __future__ import annotations

import json
from pathlib import Path

from ..checkpoint.config import (
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
from ..inputs.prompts import LATENT_TOKEN, SYSTEM_THINK

_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
_EXTRA = ["<img>", "</img>", LATENT_TOKEN]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tokenizer(folder: Path, texts: list[str], vocab_size: int = 512) -> dict[str, int]:
    """A byte-level BPE learned from texts, with Qwen's special tokens and a chat template. Returns the special ids."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(_SPECIAL) - len(_EXTRA),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in _SPECIAL + _EXTRA])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}), encoding="utf-8")
    return {t: int(tokenizer.token_to_id(t) or 0) for t in _SPECIAL + _EXTRA}


def write_random_checkpoint(folder: Path, seed: int = 0) -> None:
    """A checkpoint of a few hundred thousand random weights in the published layout, at `folder`."""
    import torch

    from .mindomni import MindOmniModel
    from .save import save_model

    ids = write_tokenizer(folder / "mllm", [SYSTEM_THINK, "Generate an image according to the following instructions"])
    rope = RopeConfig(
        kind="longrope",
        short_factor=(1.0,) * 6,
        long_factor=(2.0,) * 6,
        original_max_positions=4096,
        max_positions=131072,
    )
    phi = StackConfig(
        hidden_size=48,
        num_layers=3,
        num_heads=4,
        num_kv_heads=4,
        intermediate_size=96,
        rms_norm_eps=1e-5,
        rope=rope,
        fused=True,
    )
    qwen = StackConfig(
        hidden_size=64,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        intermediate_size=128,
        rms_norm_eps=1e-6,
        qkv_bias=True,
        rope=RopeConfig(kind="mrope", theta=1e6, mrope_section=(2, 3, 3), max_positions=2048),
    )
    config = ModelConfig(
        vision=VisionConfig(
            hidden_size=32,
            num_layers=2,
            num_heads=2,
            intermediate_size=48,
            out_hidden_size=64,
            full_attention_layers=(1,),
        ),
        language=LanguageConfig(
            stack=qwen,
            vocab_size=512,
            max_positions=2048,
            image_token_id=ids["<|image_pad|>"],
            vision_start_token_id=ids["<|vision_start|>"],
            vision_end_token_id=ids["<|vision_end|>"],
        ),
        connector=ConnectorConfig(input_size=64, stack=StackConfig(**{**phi.__dict__, "num_layers": 2})),
        decoder=DecoderConfig(stack=phi),
        vae=VAEConfig(block_out_channels=(8, 16, 16, 16), layers_per_block=1, norm_num_groups=4),
        image=ImageConfig(max_pixels=1003520),
        generation=GenerationConfig(eos_token_ids=(ids["<|im_end|>"], ids["<|endoftext|>"]), repetition_penalty=1.05),
        recommended=RecommendedConfig(width=96, height=96, num_inference_steps=20),
    )
    torch.manual_seed(seed)
    model = MindOmniModel(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=1.0 / parameter[0].numel() ** 0.5 if "embed_tokens" not in name else 1)
    save_model(model, folder)
