"""What `peers` and `gpu` compare with, on the same weights and shapes.

`EagerDecoder` is our own writing of the released code's formulation: each step runs the time token and the image tokens
of both branches as one padded batch, appends them to the cached condition with torch.cat in every layer, and attends
under a dense additive mask. `language_generate` is transformers' Qwen2.5-VL; `omnigen_step` diffusers' transformer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mindomni_rt.checkpoint.config import DecoderConfig, ModelConfig
from mindomni_rt.checkpoint.dump import config_files
from mindomni_rt.inputs.positions import image_positions, time_features
from mindomni_rt.model.attention import attention
from mindomni_rt.model.decoder import DiffusionDecoder
from mindomni_rt.model.language import LanguageModel


class EagerDecoder:
    """The whole sequence in eager PyTorch: prefill of the condition, then masked, concatenating steps.

    conditions: (1, L_p, C) of each branch; latents (1, 4, h, w) shared by them.
    """

    def __init__(self, decoder: DiffusionDecoder, conditions: list[Tensor], rows: int, columns: int) -> None:
        lengths, count = [c.shape[1] for c in conditions], rows * columns
        self.decoder, self._longest = decoder, max(lengths)
        device, self._dtype = conditions[0].device, conditions[0].dtype
        tables = decoder.whole_tables(lengths, self._longest, count)
        self._cos, self._sin = (torch.from_numpy(table).to(device) for table in tables)
        grid = image_positions(decoder.config, rows, columns)
        self._positions = torch.from_numpy(grid).to(device, self._dtype)
        seen = decoder.whole_mask(lengths, self._longest, count, (), device)
        self._mask = torch.zeros(seen.shape, device=device, dtype=self._dtype).masked_fill(~seen, float("-inf"))
        padded = [torch.nn.functional.pad(c, (0, 0, 0, self._longest - c.shape[1])) for c in conditions]
        self._cache: list[tuple[Tensor, Tensor]] = []
        self._through(torch.cat(padded), 0)

    def _through(self, x: Tensor, start: int) -> Tensor:
        """Rows from `start` on through all layers, under the mask; the first call fills the cache."""
        end = start + x.shape[1]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if start:
                k, v = (torch.cat(both, 2) for both in zip(self._cache[layer], (k, v), strict=True))
            else:
                self._cache.append((k, v))
            return attention(q, k, v, mask=self._mask[:, :, start:end, :end])

        return self.decoder.llm.layers(x, self._cos[:, start:end], self._sin[:, start:end], attend)

    def step(self, latents: Tensor, time: float) -> Tensor:
        """Velocities (P, 4, h, w) of latents (1, 4, h, w) at a time."""
        decoder, batch = self.decoder, len(self._cos)
        features = torch.from_numpy(time_features(np.array([time]), decoder.config.time_frequencies))
        features = features.to(latents.device, self._dtype)
        image = decoder.x_embedder(latents.to(self._dtype).expand(batch, -1, -1, -1)) + self._positions
        x = torch.cat([decoder.time_token(features).unsqueeze(1).expand(batch, -1, -1), image], dim=1)
        x = self._through(x, self._longest)
        return decoder.velocity(x[:, 1:], decoder.modulation(features).unsqueeze(1), *latents.shape[-2:])


def transformers_language(language: LanguageModel, config: ModelConfig) -> Any:
    """transformers' Qwen2.5-VL with our language model's own tensors (shared, not copied). Raises ImportError."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    published = config_files(config)["mllm/config.json"]
    whole = Qwen2_5_VLConfig(**{**published, "bos_token_id": None, "eos_token_id": None})
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(whole)
    state = {
        name if name == "lm_head.weight" else f"model.language_model.{name}": tensor
        for name, tensor in language.state_dict().items()
    }
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    assert not unexpected and all(".visual." in name for name in missing), (missing, unexpected)
    model.model.visual = torch.nn.Identity()  # text only
    model.tie_weights = lambda *_, **__: None  # type: ignore[method-assign]
    rotary = model.model.language_model.rotary_emb
    device = language.embed_tokens.weight.device
    model.model.language_model.rotary_emb = type(rotary)(whole.text_config).to(device)  # it was made on meta
    model.generation_config.eos_token_id = None
    return model.eval()


def language_generate(
    model: Any, ids: Tensor, new_tokens: int, static: bool, first: Callable[[], None] | None = None
) -> Tensor:
    """Greedy tokens (1, S + new). static: static cache, compiled by transformers itself. first: called when the first
    token is there."""
    options: dict[str, Any] = {"cache_implementation": "static"} if static else {}
    if first is not None:

        def look(input_ids: Tensor, _: Any, **__: Any) -> Tensor:
            """A stopping criterion that never stops; transformers asks it after every token."""
            if input_ids.shape[1] == ids.shape[1] + 1:
                if ids.is_cuda:
                    torch.cuda.synchronize(ids.device)
                first()
            return torch.zeros(1, dtype=torch.bool, device=ids.device)

        options["stopping_criteria"] = [look]
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


def omnigen_transformer(config: DecoderConfig, vocabulary: int) -> Any:
    """diffusers' OmniGen transformer of the decoder's size, on torch's default device. Raises ImportError."""
    from diffusers import OmniGenTransformer2DModel

    stack, rope = config.stack, config.stack.rope
    short, long = list(rope.short_factor), list(rope.long_factor)
    if rope.kind == "plain":
        short = long = [1.0] * (stack.head_dim // 2)
    return OmniGenTransformer2DModel(
        in_channels=config.latent_channels,
        patch_size=config.patch_size,
        hidden_size=stack.hidden_size,
        rms_norm_eps=stack.rms_norm_eps,
        num_attention_heads=stack.num_heads,
        num_key_value_heads=stack.num_kv_heads,
        intermediate_size=stack.intermediate_size,
        num_layers=stack.num_layers,
        pad_token_id=0,
        vocab_size=vocabulary,
        max_position_embeddings=rope.max_positions,
        original_max_position_embeddings=rope.original_max_positions,
        rope_base=int(rope.theta),
        rope_scaling={"short_factor": short, "long_factor": long, "type": "su"},
        pos_embed_max_size=config.position_grid,
        time_step_dim=config.time_frequencies,
    )


def omnigen_state(decoder: DiffusionDecoder) -> dict[str, Tensor]:
    """Our decoder's tensors (views, not copies) under diffusers' names; its attention takes Q, K and V apart."""
    names = {
        "x_embedder.proj": "patch_embedding.output_image_proj",
        "input_x_embedder.proj": "patch_embedding.input_image_proj",
        "time_token.mlp.0": "time_token.linear_1",
        "time_token.mlp.2": "time_token.linear_2",
        "t_embedder.mlp.0": "t_embedder.linear_1",
        "t_embedder.mlp.2": "t_embedder.linear_2",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
        "final_layer.linear": "proj_out",
    }
    stack = decoder.config.stack
    width, key_width = stack.num_heads * stack.head_dim, stack.num_kv_heads * stack.head_dim
    found: dict[str, Tensor] = {}
    for name, tensor in decoder.state_dict().items():
        module, _, kind = name.rpartition(".")
        module = names.get(module, module.removeprefix("llm."))
        if module.endswith("qkv_proj"):
            parts = tensor.split([width, key_width, key_width])
            found |= {f"{module.removesuffix('qkv_proj')}to_{p}.{kind}": t for p, t in zip("qkv", parts, strict=True)}
        elif module != "embed_tokens":
            found[f"{module.replace('.o_proj', '.to_out.0')}.{kind}"] = tensor
    return found


def omnigen_decoder(decoder: DiffusionDecoder, conditions: Sequence[Tensor]) -> Any:
    """diffusers' OmniGen with our decoder's own tensors. Raises ImportError.

    conditions: (1, L, C) of each branch. They are the rows of its text embedding, one after another from token 1 on
    (0 pads), so that token ids carry them in. The position table is diffusers' own.
    """
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    table = torch.cat([torch.zeros_like(conditions[0][0, :1]), *(c[0] for c in conditions)])
    with torch.device("meta"):
        model = omnigen_transformer(decoder.config, len(table))
    side, hidden = decoder.config.position_grid, decoder.config.stack.hidden_size
    grid = get_2d_sincos_pos_embed(hidden, side, base_size=64, interpolation_scale=1.0, output_type="pt")
    state = {
        **omnigen_state(decoder),
        "embed_tokens.weight": table,
        "patch_embedding.pos_embed": grid[None].to(table.device, table.dtype),
    }
    model.load_state_dict(state, assign=True)  # strict: every name on both sides
    return model.eval().requires_grad_(False)


def omnigen_inputs(lengths: Sequence[int], tokens: int, device: torch.device) -> dict[str, Any]:
    """Ids, mask and positions of branches of these lengths by its pipeline's own code: one batch, padded on the left.

    The longest must be first: the transformer applies the rotary positions of row 0 to the whole batch. For a shorter
    row, which starts later, that shifts all tokens alike, and RoPE depends on differences alone.
    """
    from diffusers.pipelines.omnigen.processor_omnigen import OmniGenCollator

    assert lengths[0] == max(lengths), lengths
    ends = list(accumulate(lengths, initial=1))
    collator, counts = OmniGenCollator(pad_token_id=0), [tokens] * len(lengths)
    ids, real, _ = collator.pad_input_ids([list(range(*span)) for span in pairwise(ends)], {})
    mask, _ = collator.create_mask(real, counts)
    return {
        "input_ids": ids.to(device),
        "attention_mask": mask.long().to(device),
        "position_ids": collator.create_position(real, counts).to(device),
        "input_img_latents": [],
        "input_image_sizes": {},
    }


def omnigen_step(model: Any, latents: Tensor, time: float, inputs: Mapping[str, Any]) -> Tensor:
    """Velocities (P, 4, h, w) of latents (1, 4, h, w): one forward of all branches, the condition recomputed in it."""
    batch = len(inputs["input_ids"])
    with torch.inference_mode():
        return model(
            hidden_states=latents.to(model.patch_embedding.output_image_proj.weight.dtype).expand(batch, -1, -1, -1),
            timestep=torch.full((batch,), time, device=latents.device),
            return_dict=False,
            **inputs,
        )[0]
