"""Generated configurations: what is read gives transformers' and diffusers' outputs, all else is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PARITY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from mindomni_rt.checkpoint.config import ImageConfig
from mindomni_rt.checkpoint.layout import open_checkpoint
from mindomni_rt.errors import BadCheckpointError
from mindomni_rt.inputs.images import prepare_image, smart_resize
from mindomni_rt.inputs.positions import rope_tables
from mindomni_rt.model.mindomni import load_model

SLOW = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
ABSENT = object()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy whose JSON files each example rewrites."""
    path = tmp_path_factory.mktemp("checkpoint")
    for part in ("mllm", "image_decoder", "vae"):
        shutil.copytree(PARITY / part, path / part)
    shutil.copy(PARITY / "connector.safetensors", path)
    return path


def changed(file: str, changes: dict[str, Any]) -> dict[str, Any]:
    data = json.loads((PARITY / file).read_text(encoding="utf-8"))
    for key, value in changes.items():
        data.pop(key, None)
        if value is not ABSENT:
            data[key] = value
    return data


def named(error: Exception, *words: str) -> None:
    assert any(word in str(error) for word in words), error


def pairs(**choices: list[Any]) -> list[tuple[str, Any]]:
    """Each key with each of its values."""
    return [(key, value) for key, values in choices.items() for value in values]


def some(choices: list[tuple[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    """Two or three of these keys at once; each alone is an example of its own."""
    return st.lists(st.sampled_from(choices), min_size=2, max_size=3).map(dict)


def _named(changes: dict[str, Any]) -> str:
    """A name that is the same in every process: the marker for an absent key has an address in its text."""
    return str({k: "absent" if v is ABSENT else v for k, v in changes.items()})[:60]


def each(choices: list[tuple[str, Any]]) -> Any:
    return pytest.mark.parametrize("changes", [dict([choice]) for choice in choices], ids=_named)


SECTION = {"mrope_section": [2, 3, 3]}
LANGUAGE = pairs(
    hidden_act=["silu", "gelu", "relu", "swish", ABSENT],
    rope_theta=[ABSENT, 1e4, 5e5],
    rope_scaling=[
        SECTION, {"type": "mrope", **SECTION}, {"rope_type": "default", "type": "mrope", **SECTION},
        {"type": "yarn", "factor": 4.0, **SECTION}, {"rope_type": "linear", "factor": 2.0, **SECTION},
        {"rope_type": "dynamic", "factor": 2.0, **SECTION}, {"rope_type": "default", "factor": 2.0, **SECTION},
        {"rope_type": "default", "mrope_section": [3, 3, 2]}, {"rope_type": "default", "rope_theta": 2e4, **SECTION},
        {"mrope_section": [4, 4]}, {"mrope_section": [2, 3, 4]}, None, ABSENT,
    ],
    rope_parameters=[{"rope_type": "default", "rope_theta": 3e4, **SECTION}, {"rope_theta": 1e4}],
    use_sliding_window=[True, False, None],
    sliding_window=[4, None],
    max_window_layers=[0, 1],
    layer_types=[["full_attention"] * 3, ["sliding_attention"] * 3],
    head_dim=[16, 8, None],
    partial_rotary_factor=[1.0, 0.5],
    rms_norm_eps=[1e-6, 1e-3],
    tie_word_embeddings=[True, False, ABSENT],
    num_key_value_heads=[2, 4, None, ABSENT],
    attention_bias=[True, False],
    attention_dropout=[0.5],
    max_position_embeddings=[64, 1024],
    video_token_id=[3],
    unknown_key=["x", 3],
)  # fmt: skip


@SLOW
@given(changes=some(LANGUAGE), nested=st.booleans())
def test_language(folder: Path, changes: dict[str, Any], nested: bool) -> None:
    compare_language(folder, changes, nested)


@pytest.mark.parametrize("nested", [False, True])
@each(LANGUAGE)
def test_each_key_of_language(folder: Path, changes: dict[str, Any], nested: bool) -> None:
    compare_language(folder, changes, nested)


def compare_language(folder: Path, changes: dict[str, Any], nested: bool) -> None:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    data = changed("mllm/config.json", changes)
    if nested:
        outside = ("vision_config", "architectures", "model_type", "tie_word_embeddings")
        inner = {k: v for k, v in data.items() if k not in outside and not k.endswith("_token_id")}
        data = {k: v for k, v in data.items() if k not in inner} | {"text_config": inner}
        inner["eos_token_id"] = 318
    (folder / "mllm/config.json").write_text(json.dumps(data))
    try:
        model, _ = load_model(folder)
    except BadCheckpointError as error:
        named(error, "config.json", "Config", "mrope", "shape")
        return
    config = Qwen2_5_VLConfig(**json.loads(json.dumps(data)))
    config._attn_implementation = config.text_config._attn_implementation = "eager"
    theirs = Qwen2_5_VLForConditionalGeneration(config).eval()
    state = {
        name.replace("visual.", "model.visual.", 1) if name.startswith("visual.") else
        name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name: tensor
        for name, tensor in load_file(PARITY / "mllm/model.safetensors").items()
    }  # fmt: skip
    theirs.load_state_dict(state, strict=False)
    theirs.tie_weights()
    ids = torch.arange(7, 31)[None]
    stack = model.config.language.stack
    tables = rope_tables(stack.rope, stack.head_dim, np.arange(24), 24)
    with torch.no_grad():
        found = model.language.logits(model.language(model.language.embed(ids), *map(torch.from_numpy, tables)))
        expected = theirs(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


SHORT, LONG = [1.0, 1.05, 1.1, 1.2, 1.3, 1.5], [1.0, 1.3, 1.9, 2.7, 4.1, 6.0]
FACTORS = {"short_factor": SHORT, "long_factor": LONG}
PHI3 = pairs(
    rope_scaling=[
        {"type": "longrope", **FACTORS}, {"type": "su", **FACTORS}, {"rope_type": "longrope", **FACTORS},
        {"type": "yarn", **FACTORS}, {"type": "linear", "factor": 2.0}, None, ABSENT,
        {"type": "longrope", "factor": 6.4, **FACTORS}, {"type": "longrope", "factor": 2.0, **FACTORS},
        {"type": "longrope", "attention_factor": 1.0, **FACTORS}, {"type": "longrope", "short_factor": SHORT},
        {"type": "longrope", "original_max_position_embeddings": 99, **FACTORS},
        {"type": "longrope", "rope_theta": 5e4, **FACTORS}, {"type": "default", "partial_rotary_factor": 0.5},
    ],
    rope_parameters=[{"rope_type": "longrope", "rope_theta": 2e4, **FACTORS}],
    rope_theta=[ABSENT, 5e4],
    original_max_position_embeddings=[160, 64, ABSENT],
    max_position_embeddings=[1024, 128, 160],
    partial_rotary_factor=[1.0, 0.5, ABSENT],
    hidden_act=["silu", "gelu_new"],
    sliding_window=[None, 8, 2047],
    attention_bias=[True, False],
    head_dim=[12, 6],
    rms_norm_eps=[1e-5, 1e-3],
    num_key_value_heads=[4, None, ABSENT],
    resid_pdrop=[0.3],
    unknown_key=[3],
)  # fmt: skip


@SLOW
@given(changes=some(PHI3), length=st.sampled_from([20, 159, 160, 161, 300]))
def test_decoder_positions(folder: Path, changes: dict[str, Any], length: int) -> None:
    compare_positions(folder, changes, length)


@pytest.mark.parametrize("length", [20, 300])
@each(PHI3)
def test_each_key_of_decoder(folder: Path, changes: dict[str, Any], length: int) -> None:
    compare_positions(folder, changes, length)


def compare_positions(folder: Path, changes: dict[str, Any], length: int) -> None:
    from transformers import Phi3Config
    from transformers.models.phi3.modeling_phi3 import Phi3Model

    shutil.copy(PARITY / "mllm/config.json", folder / "mllm/config.json")
    data = changed("image_decoder/config.json", changes)
    (folder / "image_decoder/config.json").write_text(json.dumps(data))
    try:
        stack = open_checkpoint(folder).config.decoder.stack
    except BadCheckpointError as error:
        named(error, "config.json", "Config")
        return
    finally:
        shutil.copy(PARITY / "image_decoder/config.json", folder / "image_decoder/config.json")
    # transformers 5 no longer reads "su", the older name of longrope, though it means to.
    text = json.dumps({**data, "vocab_size": 40, "pad_token_id": 0}).replace('"su"', '"longrope"')
    config = Phi3Config(**json.loads(text))
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    theirs = Phi3Model(config).eval()
    assert theirs.layers[0].self_attn.head_dim == stack.head_dim and config.rms_norm_eps == stack.rms_norm_eps
    assert theirs.layers[0].self_attn.num_key_value_heads == stack.num_kv_heads and config.hidden_act == "silu"
    assert config.sliding_window is None or config.sliding_window >= length
    cos, sin = theirs.rotary_emb(torch.zeros(1), torch.arange(length)[None])
    found = rope_tables(stack.rope, stack.head_dim, np.arange(length), length)
    torch.testing.assert_close(torch.from_numpy(found[0]), cos[0, :, : stack.head_dim // 2], rtol=1e-4, atol=5e-5)
    torch.testing.assert_close(torch.from_numpy(found[1]), sin[0, :, : stack.head_dim // 2], rtol=1e-4, atol=5e-5)


IMAGE = pairs(
    do_normalize=[True, False], do_rescale=[True, False], do_resize=[True, False], rescale_factor=[1 / 255, 1 / 127.5],
    resample=[3, 2], min_pixels=[56 * 56, ABSENT], max_pixels=[280 * 280, ABSENT], patch_size=[14, 16], merge_size=[2],
    size=[{"shortest_edge": 100 * 100, "longest_edge": 400 * 400}, {"height": 100, "width": 100}, ABSENT],
    image_mean=[[0.5, 0.5, 0.5], ABSENT], image_std=[[0.25, 0.5, 0.75], ABSENT], do_convert_rgb=[True, False],
    image_processor_type=["Qwen2VLImageProcessorFast", "CLIPImageProcessor"], processor_class=["Anything"],
    do_center_crop=[True, False],
)  # fmt: skip


@SLOW
@given(changes=some(IMAGE), where=st.sampled_from(["preprocessor", "processor", "both"]))
def test_images(folder: Path, changes: dict[str, Any], where: str) -> None:
    compare_images(folder, changes, where)


@each(IMAGE)
def test_each_key_of_images(folder: Path, changes: dict[str, Any]) -> None:
    compare_images(folder, changes, "preprocessor")


def compare_images(folder: Path, changes: dict[str, Any], where: str) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    for part in ("mllm", "image_decoder"):
        shutil.copy(PARITY / part / "config.json", folder / part / "config.json")
    data = changed("mllm/preprocessor_config.json", changes)
    old, new = folder / "mllm/preprocessor_config.json", folder / "mllm/processor_config.json"
    try:
        old.write_text(json.dumps(data if where == "preprocessor" else {"max_pixels": 1}))
        if where == "processor":
            old.unlink()
        if where != "preprocessor":
            new.write_text(json.dumps({"image_processor": data, "processor_class": "Qwen2_5_VLProcessor"}))
        try:
            config = open_checkpoint(folder).config
        except BadCheckpointError as error:
            named(error, "processor_config.json", "ImageConfig")
            return
    finally:
        shutil.copy(PARITY / "mllm/preprocessor_config.json", old)
        new.unlink(missing_ok=True)
    processor = Qwen2VLImageProcessorPil(**{k: v for k, v in data.items() if k not in ("processor_class",)})
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 300, 3), np.uint8))
    rows, columns = smart_resize(200, 300, 28, 4 * 28 * 28, 16384 * 28 * 28)  # the chat utility's own pass
    expected = processor(image.resize((columns, rows), Image.Resampling.BICUBIC), return_tensors="np")
    found = prepare_image(image, config, max_tokens=None)
    assert tuple(expected["image_grid_thw"][0]) == found.grid
    np.testing.assert_allclose(found.patches, expected["pixel_values"], atol=1e-4)


def test_limits_that_a_file_leaves_out_are_those_of_transformers(folder: Path) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    file = folder / "mllm/preprocessor_config.json"
    try:
        file.write_text('{"image_processor_type": "Qwen2VLImageProcessor"}')
        limits = open_checkpoint(folder).config.image
    finally:
        shutil.copy(PARITY / "mllm/preprocessor_config.json", file)
    size = Qwen2VLImageProcessorPil().size
    assert limits == ImageConfig(min_pixels=size["shortest_edge"], max_pixels=size["longest_edge"])


VAE = pairs(
    act_fn=["silu", "relu"], latents_mean=[None, [0.0] * 4], latents_std=[[1.0] * 4], mid_block_add_attention=[False],
    use_quant_conv=[True, False], use_post_quant_conv=[True, False], scaling_factor=[0.13025, 0.5, 0, -1, "x", True],
    shift_factor=[None, 0.1], force_upcast=[False], sample_size=[7], norm_num_groups=[4, 2, 3, 0],
    down_block_types=[["DownEncoderBlock2D"] * 4, ["DownEncoderBlock2D"] * 3 + ["AttnDownEncoderBlock2D"]],
)  # fmt: skip


@SLOW
@given(changes=some(VAE))
def test_vae(folder: Path, changes: dict[str, Any]) -> None:
    compare_vae(folder, changes)


@each(VAE)
def test_each_key_of_vae(folder: Path, changes: dict[str, Any]) -> None:
    compare_vae(folder, changes)


def compare_vae(folder: Path, changes: dict[str, Any]) -> None:
    from diffusers import AutoencoderKL

    data = changed("vae/config.json", changes)
    for part in ("mllm", "image_decoder"):
        shutil.copy(PARITY / part / "config.json", folder / part / "config.json")
    (folder / "vae/config.json").write_text(json.dumps(data))
    try:
        model, _ = load_model(folder)
    except BadCheckpointError as error:
        named(error, "vae/config.json", "VAEConfig")
        return
    finally:
        shutil.copy(PARITY / "vae/config.json", folder / "vae/config.json")
    theirs = AutoencoderKL.from_config(data).eval()
    theirs.load_state_dict(load_file(PARITY / "vae/diffusion_pytorch_model.safetensors"))
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model.vae.decode(latents), theirs.decode(latents).sample, rtol=1e-3, atol=1e-4)
    assert model.config.vae.scaling_factor == theirs.config.scaling_factor
    assert model.config.vae.shift_factor == (theirs.config.shift_factor or 0)
