"""The language model and the connector's block against transformers on random small configurations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import Phi3Config, Qwen2_5_VLTextConfig
from transformers.models.phi3.modeling_phi3 import Phi3Model
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

from mindomni_rt.checkpoint.config import ConnectorConfig, LanguageConfig, RopeConfig, StackConfig
from mindomni_rt.errors import BadRequestError
from mindomni_rt.inputs.positions import mrope_positions, rope_tables
from mindomni_rt.model.block import Block
from mindomni_rt.model.cache import StaticCache
from mindomni_rt.model.connector import Connector
from mindomni_rt.model.language import LanguageModel


def language_config(heads: int = 4, kv_heads: int = 2, head_dim: int = 16, layers: int = 2) -> LanguageConfig:
    sections = (head_dim // 8, head_dim // 4 - head_dim // 8, head_dim // 4)
    stack = StackConfig(
        hidden_size=heads * head_dim,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        intermediate_size=48,
        rms_norm_eps=1e-6,
        qkv_bias=True,
        rope=RopeConfig(kind="mrope", theta=1e6, mrope_section=sections, max_positions=512),
    )
    return LanguageConfig(
        stack=stack,
        vocab_size=97,
        max_positions=512,
        image_token_id=90,
        vision_start_token_id=91,
        vision_end_token_id=92,
    )


def reference_language(config: LanguageConfig) -> Qwen2_5_VLTextModel:
    stack = config.stack
    theirs = Qwen2_5_VLTextConfig(
        hidden_size=stack.hidden_size,
        num_hidden_layers=stack.num_layers,
        num_attention_heads=stack.num_heads,
        num_key_value_heads=stack.num_kv_heads,
        intermediate_size=stack.intermediate_size,
        rms_norm_eps=stack.rms_norm_eps,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": list(stack.rope.mrope_section)},
    )
    theirs._attn_implementation = "eager"
    return Qwen2_5_VLTextModel(theirs).eval()


def tables(config: LanguageConfig, positions: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = rope_tables(config.stack.rope, config.stack.head_dim, positions, positions.shape[-1])
    return torch.from_numpy(cos), torch.from_numpy(sin)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 16), (6, 1, 8), (2, 2, 32), (7, 7, 16)])
def test_hidden_states_agree_with_transformers(heads: int, kv_heads: int, head_dim: int) -> None:
    torch.manual_seed(heads)
    config = language_config(heads, kv_heads, head_dim)
    theirs, ours = reference_language(config), LanguageModel(config)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    ours.load_state_dict({**theirs.state_dict(), "lm_head.weight": ours.lm_head.weight}, strict=True)
    x = torch.randn(2, 11, config.stack.hidden_size)
    positions = np.stack([np.arange(11), np.arange(11) // 2, np.arange(11)[::-1]])  # as unlike as three axes can be
    with torch.no_grad():
        expected = theirs(
            inputs_embeds=x, position_ids=torch.from_numpy(positions.copy())[:, None].expand(-1, 2, -1)
        ).last_hidden_state
        found = ours.norm(ours(x, *tables(config, positions)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("split", [1, 4, 10])
def test_cache_continues_where_one_pass_would_be(split: int) -> None:
    torch.manual_seed(split)
    config = language_config()
    model = LanguageModel(config).double()
    x = torch.randn(1, 11, config.stack.hidden_size, dtype=torch.float64)
    cos, sin = (t.double() for t in tables(config, np.arange(11)))
    with torch.no_grad():
        whole = model(x, cos, sin)
        cache = StaticCache(config.stack, 13, dtype=torch.float64)
        parts = [model(x[:, :split], cos[:split], sin[:split], cache, 0)]
        parts.append(model(x[:, split:9], cos[split:9], sin[split:9], cache, split) if split < 9 else x[:, :0])
        parts += [model(x[:, i : i + 1], cos[i : i + 1], sin[i : i + 1], cache, i) for i in range(max(split, 9), 11)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-10, atol=1e-12)


def test_image_positions_by_hand() -> None:
    config = language_config()
    ids = [1, 91, *[90] * 6, 92, 5]  # an image of 4x6 patches: 2x3 merged tokens
    positions, following = mrope_positions(ids, [(1, 4, 6)], config)
    assert positions[0].tolist() == [0, 1, 2, 2, 2, 2, 2, 2, 5, 6]
    assert positions[1].tolist() == [0, 1, 2, 2, 2, 3, 3, 3, 5, 6]
    assert positions[2].tolist() == [0, 1, 2, 3, 4, 2, 3, 4, 5, 6]
    assert following == 7
    with pytest.raises(BadRequestError, match="6 image tokens"):
        mrope_positions(ids, [(1, 4, 4)], config)


@pytest.mark.parametrize("length", [5, 30])
def test_longrope_block_agrees_with_phi3(length: int) -> None:
    """Short factors up to the original context, long ones beyond it, both scaled."""
    torch.manual_seed(length)
    short, long = [1.0, 1.1, 1.3, 2.0], [1.5, 2.0, 4.0, 9.0]
    theirs_config = Phi3Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=40,
        vocab_size=50,
        pad_token_id=0,
        max_position_embeddings=256,
        original_max_position_embeddings=16,
        rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, "short_factor": short, "long_factor": long},
    )
    theirs_config._attn_implementation = "eager"
    theirs = Phi3Model(theirs_config).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    rope = RopeConfig(
        kind="longrope",
        short_factor=tuple(short),
        long_factor=tuple(long),
        original_max_positions=16,
        max_positions=256,
    )
    stack = StackConfig(
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=4,
        intermediate_size=40,
        rms_norm_eps=theirs_config.rms_norm_eps,
        rope=rope,
        fused=True,
    )
    ours = Connector(ConnectorConfig(input_size=32, stack=stack))
    with torch.no_grad():
        ours[0].weight.copy_(torch.eye(32))
        ours[0].bias.zero_()
    for index in range(2):
        ours[index + 1].load_state_dict(theirs.layers[index].state_dict())
    assert isinstance(ours[1], Block)
    x = torch.randn(1, length, 32)
    cos, sin = rope_tables(rope, 8, np.arange(length), length)
    with torch.no_grad():
        expected = theirs(inputs_embeds=x).last_hidden_state
        found = theirs.norm(ours(x, torch.from_numpy(cos), torch.from_numpy(sin)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
