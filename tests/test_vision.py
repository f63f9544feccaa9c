"""The vision tower against transformers on random grids, partial windows included."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from mindomni_rt.config import VisionConfig, published
from mindomni_rt.model.vision import VisionTower
from mindomni_rt.vision_layout import vision_layout

CONFIG = VisionConfig(
    hidden_size=32, num_layers=4, num_heads=2, intermediate_size=40, out_hidden_size=24, full_attention_layers=(1, 3)
)


def reference(config: VisionConfig) -> Qwen2_5_VisionTransformerPretrainedModel:
    theirs = Qwen2_5_VLVisionConfig(
        depth=config.num_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=config.num_heads,
        out_hidden_size=config.out_hidden_size,
        fullatt_block_indexes=list(config.full_attention_layers),
        window_size=config.window_size,
    )
    theirs._attn_implementation = "eager"
    return Qwen2_5_VisionTransformerPretrainedModel(theirs).eval()


def tables(config: VisionConfig, grid: tuple[int, int, int]) -> list[torch.Tensor]:
    return [torch.from_numpy(np.ascontiguousarray(a)) for a in vision_layout(config, grid).arrays()]


@pytest.mark.parametrize("grid", [(1, 8, 8), (1, 16, 24), (1, 10, 14), (1, 2, 2), (1, 4, 30), (1, 18, 6)])
def test_agrees_with_transformers(grid: tuple[int, int, int]) -> None:
    torch.manual_seed(grid[1])
    theirs, ours = reference(CONFIG), VisionTower(CONFIG)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    patches = torch.randn(grid[1] * grid[2], CONFIG.patch_dim) * 0.1
    with torch.no_grad():
        out = theirs(patches, torch.tensor([grid]))
        expected = getattr(out, "pooler_output", out)
        expected = torch.cat(list(expected)) if isinstance(expected, (list, tuple)) else expected
        found = ours(patches, *tables(CONFIG, grid))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_layout_is_a_partition() -> None:
    layout = vision_layout(CONFIG, (1, 10, 14))
    assert np.array_equal(layout.slots[layout.places], np.arange(140))
    valid = layout.mask[:, 0, 0, :].reshape(-1)
    assert sorted(layout.slots[valid]) == list(range(140))


def test_full_size_on_the_meta_device() -> None:
    config = published().vision
    with torch.device("meta"):
        ours, theirs = VisionTower(config), reference(config)
    assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}
