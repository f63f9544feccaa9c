"""What `gpu_suite` compares with, on the same weights and shapes.

`EagerDecoder` is our own writing of the released code's formulation: each step runs the time token and the image tokens
of both branches as one padded batch, appends them to the cached condition with torch.cat in every layer, and attends
under a dense additive mask. `language_generate` is transformers' Qwen2.5-VL; `omnigen_step` diffusers' transformer.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mindomni_rt.config import ModelConfig
from mindomni_rt.model.attention import attention
from mindomni_rt.model.decoder import DiffusionDecoder
from mindomni_rt.model.language import LanguageModel
from mindomni_rt.positions import image_positions, rope_tables, time_features


class EagerDecoder:
    """The whole sequence in eager PyTorch: prefill of the condition, then masked, concatenating steps.

    conditions: (1, L_p, C) of each branch; latents (1, 4, h, w) shared by them.
    """

    def __init__(self, decoder: DiffusionDecoder, conditions: list[Tensor], rows: int, columns: int) -> None:
        self.decoder, self._lengths = decoder, [c.shape[1] for c in conditions]
        self._longest, self._count = max(self._lengths), rows * columns
        stack, batch = decoder.config.stack, len(conditions)
        device, self._dtype = conditions[0].device, conditions[0].dtype
        places, total = [], self._longest + 1 + self._count
        for length in self._lengths:  # left-padded, as a chat batch is
            place = np.concatenate([np.zeros(self._longest - length), np.arange(length + 1 + self._count)])
            places.append(rope_tables(stack.rope, stack.head_dim, place, length + 1 + self._count))
        self._cos = torch.from_numpy(np.stack([c for c, _ in places])).to(device)
        self._sin = torch.from_numpy(np.stack([s for _, s in places])).to(device)
        grid = image_positions(decoder.config, rows, columns)
        self._positions = torch.from_numpy(grid).to(device, self._dtype)
        seen = torch.zeros(batch, 1, total, total, device=device, dtype=torch.bool)
        for row, length in enumerate(self._lengths):
            pad = self._longest - length
            causal = torch.ones(total, total, device=device, dtype=torch.bool).tril()
            causal[self._longest + 1 :] = True
            causal[:, :pad] = False
            seen[row, 0] = causal | torch.eye(total, device=device, dtype=torch.bool)
        self._mask = torch.zeros(seen.shape, device=device, dtype=self._dtype).masked_fill(~seen, float("-inf"))
        padded = [torch.nn.functional.pad(c, (0, 0, self._longest - c.shape[1], 0)) for c in conditions]
        self._cache: list[tuple[Tensor, Tensor]] = []
        self._prefill(torch.cat(padded))

    def _prefill(self, x: Tensor) -> None:
        length = self._longest
        mask = self._mask[:, :, :length, :length]

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self._cache.append((k, v))
            return attention(q, k, v, mask=mask)

        for layer in self.decoder.llm.layers:
            x = layer(x, self._cos[:, :length], self._sin[:, :length], attend)

    def step(self, latents: Tensor, time: float) -> Tensor:
        """Velocities (P, 4, h, w) of latents (1, 4, h, w) at a time."""
        decoder, start = self.decoder, self._longest
        features = torch.from_numpy(time_features(np.array([time]), decoder.config.time_frequencies))
        features = features.to(latents.device, self._dtype)
        batch = len(self._lengths)
        image = decoder.x_embedder(latents.to(self._dtype).expand(batch, -1, -1, -1)) + self._positions
        x = torch.cat([decoder.time_token(features).unsqueeze(1).expand(batch, -1, -1), image], dim=1)
        mask = self._mask[:, :, start:]
        for index, layer in enumerate(decoder.llm.layers):

            def attend(q: Tensor, k: Tensor, v: Tensor, index: int = index) -> Tensor:
                old_k, old_v = self._cache[index]
                return attention(q, torch.cat([old_k, k], 2), torch.cat([old_v, v], 2), mask=mask)

            x = layer(x, self._cos[:, start:], self._sin[:, start:], attend)
        modulation = decoder.modulation(features).unsqueeze(1)
        return decoder._velocity(x[:, 1:], modulation, *latents.shape[-2:])


def transformers_language(language: LanguageModel) -> Any:
    """transformers' Qwen2.5-VL with our language model's own tensors (shared, not copied). Raises ImportError."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config, stack = language.config, language.config.stack
    text = dict(
        hidden_size=stack.hidden_size,
        num_hidden_layers=stack.num_layers,
        num_attention_heads=stack.num_heads,
        num_key_value_heads=stack.num_kv_heads,
        intermediate_size=stack.intermediate_size,
        rms_norm_eps=stack.rms_norm_eps,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_positions,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": stack.rope.theta,
            "mrope_section": list(stack.rope.mrope_section),
        },
    )
    vision = dict(depth=1, hidden_size=64, num_heads=2, intermediate_size=64, out_hidden_size=stack.hidden_size)
    whole = Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=config.image_token_id)
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(whole)
    state = {
        ("lm_head.weight" if name == "lm_head.weight" else f"model.language_model.{name}"): tensor
        for name, tensor in language.state_dict().items()
    }
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    assert not unexpected and all(".visual." in name for name in missing), (missing, unexpected)
    model.model.visual = torch.nn.Identity()  # text only
    model.tie_weights = lambda *_, **__: None
    rotary = model.model.language_model.rotary_emb
    device = language.embed_tokens.weight.device
    model.model.language_model.rotary_emb = type(rotary)(whole.text_config).to(device)  # it was made on meta
    model.generation_config.eos_token_id = None
    return model.eval()


def language_generate(model: Any, ids: Tensor, new_tokens: int, static: bool) -> Tensor:
    """Greedy tokens (1, S + new). static: static cache, compiled by transformers itself."""
    options: dict[str, Any] = {"cache_implementation": "static"} if static else {}
    with torch.inference_mode():
        return model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
            repetition_penalty=1.0,
            **options,
        )


def omnigen_transformer(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Any:
    """diffusers' OmniGen transformer of the decoder's size with random weights. Raises ImportError."""
    from diffusers import OmniGenTransformer2DModel

    stack = config.decoder.stack
    with device:
        model = OmniGenTransformer2DModel(
            in_channels=config.decoder.latent_channels,
            patch_size=config.decoder.patch_size,
            hidden_size=stack.hidden_size,
            rms_norm_eps=stack.rms_norm_eps,
            num_attention_heads=stack.num_heads,
            num_key_value_heads=stack.num_kv_heads,
            intermediate_size=stack.intermediate_size,
            num_layers=stack.num_layers,
            pad_token_id=0,
            vocab_size=64,
            max_position_embeddings=stack.rope.max_positions,
            original_max_position_embeddings=stack.rope.original_max_positions,
            rope_base=int(stack.rope.theta),
            rope_scaling={
                "short_factor": list(stack.rope.short_factor),
                "long_factor": list(stack.rope.long_factor),
                "type": "su",
            },
        )
    return model.to(dtype).eval()


def omnigen_step(model: Any, latents: Tensor, length: int) -> Tensor:
    """One forward of both branches as its pipeline runs it: a batch of two, text of `length` tokens, dense mask."""
    batch, device = 2, latents.device
    patch = model.config.patch_size
    tokens = (latents.shape[-2] // patch) * (latents.shape[-1] // patch)
    total = length + 1 + tokens
    mask = torch.ones(total, total, dtype=torch.long, device=device).tril()
    mask[length + 1 :] = 1
    with torch.inference_mode():
        return model(
            hidden_states=latents.expand(batch, -1, -1, -1),
            timestep=torch.full((batch,), 0.5, device=device),
            input_ids=torch.zeros(batch, length, dtype=torch.long, device=device),
            input_img_latents=[],
            input_image_sizes={},
            attention_mask=mask.expand(batch, -1, -1),
            position_ids=torch.arange(total, device=device).expand(batch, -1),
            return_dict=False,
        )[0]
