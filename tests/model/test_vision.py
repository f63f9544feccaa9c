"""The vision tower against transformers on random grids, partial windows included."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from mindomni_rt.checkpoint.config import VisionConfig, published
from mindomni_rt.errors import BadRequestError
from mindomni_rt.inputs.vision_layout import vision_layout
from mindomni_rt.model.vision import VisionTower

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


def pair(config: VisionConfig, seed: int = 0) -> tuple[Qwen2_5_VisionTransformerPretrainedModel, VisionTower]:
    torch.manual_seed(seed)
    theirs, ours = reference(config), VisionTower(config)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


@torch.no_grad()
def both(
    theirs: Qwen2_5_VisionTransformerPretrainedModel, ours: VisionTower, grid: tuple[int, int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of random patches: ours, transformers'."""
    patches = torch.randn(grid[1] * grid[2], ours.config.patch_dim) * 0.1
    out = theirs(patches.to(theirs.dtype), torch.tensor([grid]))
    expected = getattr(out, "pooler_output", out)
    expected = torch.cat(list(expected)) if isinstance(expected, (list, tuple)) else expected
    return ours(patches, *tables(ours.config, grid)), expected


@pytest.mark.parametrize("grid", [(1, 8, 8), (1, 16, 24), (1, 10, 14), (1, 2, 2), (1, 4, 30), (1, 18, 6)])
def test_agrees_with_transformers(grid: tuple[int, int, int]) -> None:
    found, expected = both(*pair(CONFIG, grid[1]), grid)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (found - expected).norm() / expected.norm() < 1e-5


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 13),
    columns=st.integers(1, 13),
    window=st.sampled_from([56, 84, 112, 126]),
    heads=st.sampled_from([(16, 1), (32, 2), (48, 2)]),
    whole=st.sets(st.integers(0, 2)),
)
def test_agrees_on_random_configurations(
    rows: int, columns: int, window: int, heads: tuple[int, int], whole: set[int]
) -> None:
    config = replace(
        CONFIG, num_layers=3, hidden_size=heads[0], num_heads=heads[1], window_size=window,
        full_attention_layers=tuple(sorted(whole)),
    )  # fmt: skip
    found, expected = both(*pair(config), (1, 2 * rows, 2 * columns))
    assert (found - expected).norm() / expected.norm() < 1e-5


def test_bfloat16_stays_as_near_as_transformers() -> None:
    theirs, ours = pair(CONFIG)
    exact = both(theirs, ours, (1, 10, 14))[1]
    torch.manual_seed(0)
    pair(CONFIG)  # the same draws, so that both runs see the same patches
    found, expected = both(theirs.bfloat16(), ours.bfloat16(), (1, 10, 14))
    assert found.dtype == torch.bfloat16
    errors = [((t.float() - exact).norm() / exact.norm()).item() for t in (found, expected)]
    assert errors[0] < max(0.02, 1.3 * errors[1]), errors


@pytest.mark.parametrize("grid", [(2, 8, 8), (1, 7, 8), (1, 0, 2), (1, 8, 3)])
def test_other_grids_are_named_errors(grid: tuple[int, int, int]) -> None:
    with pytest.raises(BadRequestError, match="grid"):
        vision_layout(CONFIG, grid)


def test_one_onnx_graph_serves_every_grid(tmp_path: Path) -> None:
    """Exported from one grid with dynamic sizes, run by onnxruntime on others."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    config = replace(CONFIG, num_layers=2, full_attention_layers=(1,))
    ours = pair(config)[1].eval()
    dynamic = ({0: torch.export.Dim.AUTO},) * 6
    example = (torch.randn(140, config.patch_dim), *tables(config, (1, 10, 14)))
    program = torch.onnx.export(ours, example, dynamo=True, dynamic_shapes=dynamic, opset_version=23, verbose=False)
    program.save(tmp_path / "vision.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "vision.onnx")
    for grid in [(1, 10, 14), (1, 2, 2), (1, 18, 6)]:
        inputs = (torch.randn(grid[1] * grid[2], config.patch_dim) * 0.1, *tables(config, grid))
        feed = {slot.name: value.numpy() for slot, value in zip(session.get_inputs(), inputs, strict=True)}
        with torch.no_grad():
            expected = ours(*inputs).numpy()
        found = session.run(None, feed)[0]
        assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 1e-5


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
