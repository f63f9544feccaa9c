"""The published layout: every spelling, round trips to the bit, and each way a file can be wrong."""

from __future__ import annotations

import json
import logging
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PARITY
from safetensors.torch import load_file, save_file

from mindomni_rt.checkpoint.config import ModelConfig, published
from mindomni_rt.checkpoint.dump import config_files
from mindomni_rt.checkpoint.layout import open_checkpoint, resolve
from mindomni_rt.errors import BadCheckpointError
from mindomni_rt.model.mindomni import MindOmniModel, load_model
from mindomni_rt.model.save import save_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the checkpoint that a test may damage."""
    for part in ("mllm", "image_decoder", "vae"):
        shutil.copytree(PARITY / part, tmp_path / part)
    shutil.copy(PARITY / "connector.safetensors", tmp_path)
    return tmp_path


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(load_file(path)), path)


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def states(model: MindOmniModel) -> dict[str, torch.Tensor]:
    return dict(model.state_dict())


def same(a: MindOmniModel, b: MindOmniModel) -> bool:
    first, second = states(a), states(b)
    return first.keys() == second.keys() and all(
        first[k].dtype == second[k].dtype and torch.equal(first[k], second[k]) for k in first
    )


FILES = [
    "mllm/model.safetensors",
    "image_decoder/model.safetensors",
    "connector.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_round_trip_is_bit_exact(folder: Path, tmp_path_factory: pytest.TempPathFactory, dtype: torch.dtype) -> None:
    for name in FILES:
        rewrite(folder / name, lambda state: {k: t.to(dtype) for k, t in state.items()})
    model, report = load_model(folder)
    assert sum(report.read.values()) == len(states(model))
    out = tmp_path_factory.mktemp("saved")
    save_model(model, out, source=folder)
    again, _ = load_model(out)
    assert same(model, again)
    assert {p.dtype for p in model.parameters()} == {dtype}
    for name in FILES:  # tensor by tensor, under the names of the published files
        before, after = load_file(folder / name), load_file(out / name)
        dropped = {k for k in before if k == "pos_embed"}
        assert after.keys() == before.keys() - dropped
        assert all(torch.equal(before[k], after[k]) for k in after)
    assert (out / "mllm" / "config.json").read_bytes() == (folder / "mllm" / "config.json").read_bytes()


def test_configurations_written_are_read_back(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    model, _ = load_model(folder)
    out = tmp_path_factory.mktemp("saved")
    save_model(model, out)
    assert load_model(out)[0].config == model.config
    full = config_files(published())
    assert full["mllm/config.json"]["vision_config"]["fullatt_block_indexes"] == [7, 15, 23, 31]


def newer_prefixes(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    def rename(key: str) -> str:
        if key.startswith("visual."):
            return f"model.{key}"
        return key.replace("model.", "model.language_model.", 1) if key.startswith("model.") else key

    return {rename(k): t for k, t in state.items()}


def legacy_vae(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    for new, old in ((".to_q.", ".query."), (".to_k.", ".key."), (".to_v.", ".value."), (".to_out.0.", ".proj_attn.")):
        state = {k.replace(new, old): t for k, t in state.items()}
    return state


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("mllm/model.safetensors", newer_prefixes),
        ("vae/diffusion_pytorch_model.safetensors", legacy_vae),
        ("image_decoder/model.safetensors", lambda s: {**s, "pos_embed": torch.zeros(1, 4, 48)}),
    ],
)
def test_spellings_of_tensors(folder: Path, file: str, change: Callable[..., Any]) -> None:
    expected, _ = load_model(folder)
    rewrite(folder / file, change)
    found, report = load_model(folder)
    assert same(expected, found)
    assert ("decoder.pos_embed" in report.computed) == ("decoder" in file) or "image_decoder" not in file


def to_rope_parameters(data: dict[str, Any]) -> None:
    data["rope_parameters"] = {**data.pop("rope_scaling"), "rope_theta": data.pop("rope_theta")}


def nest_text_config(data: dict[str, Any]) -> None:
    names = [k for k in data if k not in ("vision_config", "image_token_id", "vision_start_token_id", "model_type")]
    data["text_config"] = {k: data.pop(k) for k in names if not k.startswith(("vision_", "tie_"))}


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("image_decoder/config.json", lambda d: d["rope_scaling"].update(type="su")),
        (
            "image_decoder/config.json",
            lambda d: d["rope_scaling"].update(rope_type=d["rope_scaling"].pop("type")),
        ),
        ("image_decoder/config.json", to_rope_parameters),
        ("mllm/config.json", to_rope_parameters),
        ("mllm/config.json", nest_text_config),
        ("mllm/config.json", lambda d: d["rope_scaling"].update(type="mrope", rope_type="default")),
        ("mllm/preprocessor_config.json", lambda d: (d.pop("min_pixels"), d.pop("max_pixels"))),
        ("mllm/generation_config.json", lambda d: None),
    ],
)
def test_spellings_of_configurations(folder: Path, file: str, change: Callable[..., Any]) -> None:
    expected = open_checkpoint(folder).config
    edit_json(folder / file, change)
    assert open_checkpoint(folder).config == expected


def test_shards(folder: Path) -> None:
    expected, _ = load_model(folder)
    state = load_file(folder / "mllm/model.safetensors")
    names = sorted(state)
    (folder / "mllm/model.safetensors").unlink()
    weight_map = {}
    for index, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{index:05d}-of-00002.safetensors"
        save_file({k: state[k] for k in part}, folder / "mllm" / file)
        weight_map.update(dict.fromkeys(part, file))
    (folder / "mllm/model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert same(expected, load_model(folder)[0])
    (folder / "mllm" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(BadCheckpointError, match=r"model-00002-of-00002\.safetensors is missing"):
        load_model(folder)


def test_shards_are_written_when_large(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mindomni_rt.checkpoint.dump.SHARD_BYTES", 200_000)
    model, _ = load_model(folder)
    out = tmp_path_factory.mktemp("saved")
    save_model(model, out, source=folder)
    assert len(list((out / "mllm").glob("model-*-of-*.safetensors"))) > 1
    assert same(model, load_model(out)[0])


def test_pickled_decoder(folder: Path) -> None:
    expected, _ = load_model(folder)
    path = folder / "image_decoder/model.safetensors"
    torch.save(load_file(path), folder / "image_decoder/model.pt")
    path.unlink()
    assert same(expected, load_model(folder)[0])


def test_a_pickle_that_executes_is_refused(folder: Path) -> None:
    import os

    class Evil:
        def __reduce__(self) -> Any:
            return os.system, ("touch pwned",)

    (folder / "image_decoder/model.safetensors").unlink()
    torch.save({"x": Evil()}, folder / "image_decoder/model.pt")
    with pytest.raises(BadCheckpointError, match=r"model\.pt"):
        load_model(folder)
    assert not Path("pwned").exists()


def test_tied_head(folder: Path) -> None:
    edit_json(folder / "mllm/config.json", lambda d: d.update(tie_word_embeddings=True))
    rewrite(folder / "mllm/model.safetensors", lambda s: {k: t for k, t in s.items() if k != "lm_head.weight"})
    model, report = load_model(folder)
    assert model.language.lm_head.weight is model.language.embed_tokens.weight
    assert any("tied" in name for name in report.computed)


def test_optional_parts_are_reported(folder: Path) -> None:
    rewrite(
        folder / "image_decoder/model.safetensors",
        lambda s: {k: t for k, t in s.items() if not k.startswith("input_x_embedder")},
    )
    rewrite(
        folder / "vae/diffusion_pytorch_model.safetensors",
        lambda s: {k: t for k, t in s.items() if not k.startswith(("encoder.", "quant_conv."))},
    )
    model, report = load_model(folder)
    assert model.vae.encoder is None and model.decoder.input_x_embedder is None
    assert len(report.absent) == 3 and "input_x_embedder" in report.absent[0]
    assert "absent" in str(report)


def test_unused_tensors_are_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    rewrite(folder / "connector.safetensors", lambda s: {**s, "1.extra.weight": torch.zeros(1)})
    with caplog.at_level(logging.WARNING):
        _, report = load_model(folder)
    assert report.unused == ["connector.1.extra.weight"] and "no use" in caplog.text


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keep", [0, 5, 1000, -1])
def test_truncated_files(folder: Path, name: str, keep: int) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:keep])
    with pytest.raises(BadCheckpointError, match=Path(name).name):
        load_model(folder)


@pytest.mark.parametrize("name", FILES)
def test_missing_tensors(folder: Path, name: str) -> None:
    state = load_file(folder / name)
    for key in (sorted(state)[0], sorted(state)[-1]):
        save_file({k: t for k, t in state.items() if k != key}, folder / name)
        with pytest.raises(BadCheckpointError, match=r"missing|gaps"):
            load_model(folder)


@pytest.mark.parametrize("name", FILES)
def test_wrong_shapes_name_expected_and_found(folder: Path, name: str) -> None:
    state = load_file(folder / name)
    key = next(k for k in sorted(state) if k.endswith(("norm.weight", "norm1.weight", "layernorm.weight")))
    shape = tuple(state[key].shape)
    save_file({**state, key: torch.zeros(shape[0] + 1)}, folder / name)
    with pytest.raises(BadCheckpointError) as error:
        load_model(folder)
    assert key in str(error.value) and str(shape) in str(error.value) and str((shape[0] + 1,)) in str(error.value)


def test_integer_weights_are_refused(folder: Path) -> None:
    rewrite(folder / "connector.safetensors", lambda s: {**s, "0.bias": torch.zeros(48, dtype=torch.int64)})
    with pytest.raises(BadCheckpointError, match="I64"):
        load_model(folder)


@pytest.mark.parametrize("name", ["mllm/config.json", "image_decoder/config.json", "vae/config.json"])
def test_bad_configurations(folder: Path, name: str) -> None:
    data = json.loads((folder / name).read_text())
    for bad, message in (("{", "JSON"), ("[]", "object"), ("{}", "lacks")):
        (folder / name).write_text(bad)
        with pytest.raises(BadCheckpointError, match=message):
            open_checkpoint(folder)
    (folder / name).unlink()
    with pytest.raises(BadCheckpointError, match="missing"):
        open_checkpoint(folder)
    assert data


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("image_decoder/config.json", lambda d: d["rope_scaling"].update(type="yarn"), "yarn"),
        ("image_decoder/config.json", lambda d: d["rope_scaling"].update(long_factor=[1.0]), "long_factor"),
        ("image_decoder/config.json", lambda d: d.update(partial_rotary_factor=0.5), "partial_rotary"),
        ("image_decoder/config.json", lambda d: d.update(num_attention_heads=12), "short_factor"),
        ("mllm/config.json", lambda d: d.update(num_attention_heads=5), "divide"),
        ("vae/config.json", lambda d: d.update(use_post_quant_conv=False), "post_quant"),
    ],
)
def test_what_is_not_supported_says_so(folder: Path, file: str, change: Callable[..., Any], message: str) -> None:
    edit_json(folder / file, change)
    with pytest.raises(BadCheckpointError, match=message):
        open_checkpoint(folder)


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(PARITY) == PARITY
    with pytest.raises(BadCheckpointError, match="not a hub id"):
        resolve(tmp_path / "none" / "at" / "all")
    (tmp_path / "file").write_text("")
    with pytest.raises(BadCheckpointError, match="is a file"):
        resolve(tmp_path / "file")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(BadCheckpointError, match="hub"):
        resolve("nobody/nothing", local_files_only=True)
    with pytest.raises(BadCheckpointError, match=r"safetensors|missing"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("answers", ["refuses", "hangs"])
def test_a_hub_that_does_not_answer_is_named_soon(answers: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A port that refuses, and one that takes the connection and says nothing: the hub's own call has no time limit."""
    constants = pytest.importorskip("huggingface_hub.constants")
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr("mindomni_rt.checkpoint.hub._PATIENCE", 0.5)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        if answers == "refuses":
            server.close()
        began = time.monotonic()
        with pytest.raises(BadCheckpointError, match=r"no folder at some/model.* does not answer"):
            resolve("some/model")
    assert time.monotonic() - began < 30


def test_a_saved_model_carries_no_record_of_its_source(folder: Path, tmp_path: Path) -> None:
    """Measurements of a packed model are not those of what training makes of it."""
    (folder / "evaluation.json").write_text("{}")
    model, _ = load_model(folder)
    save_model(model, tmp_path / "out", source=folder)
    assert (tmp_path / "out" / "mllm" / "tokenizer.json").exists()
    assert not (tmp_path / "out" / "evaluation.json").exists()


def test_a_hub_cache_is_read(tmp_path: Path) -> None:
    """What huggingface_hub would have downloaded, found again offline by id and revision."""
    commit = "0" * 40
    repo = tmp_path / "models--someone--mindomni"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    shutil.copytree(PARITY, repo / "snapshots" / commit)
    from huggingface_hub import snapshot_download

    found = snapshot_download("someone/mindomni", cache_dir=tmp_path, local_files_only=True)
    assert Path(found).samefile(repo / "snapshots" / commit)
    assert open_checkpoint(Path(found)).config == open_checkpoint(PARITY).config


def test_full_size_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = MindOmniModel(published())
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    # Hand-computed: qkv 3072·9216, o 3072², gate_up 3072·16384, down 8192·3072, two norms.
    layer = 3072 * 9216 + 3072**2 + 3072 * 16384 + 8192 * 3072 + 2 * 3072
    assert count["connector"] == 3584 * 3072 + 3072 + 2 * layer
    assert sum(p.numel() for p in model.decoder.llm.layers.parameters()) == 32 * layer
    assert 7.6e9 < count["language"] < 7.63e9 and 0.67e9 < count["vision"] < 0.68e9
    assert 83e6 < count["vae"] < 84e6
    assert ModelConfig.from_dict(json.loads(json.dumps(published().to_dict()))) == published()


def test_unknown_configuration_keys_are_errors() -> None:
    data = published().to_dict()
    data["decoder"]["colour"] = 1
    with pytest.raises(BadCheckpointError, match="colour"):
        ModelConfig.from_dict(data)
    with pytest.raises(BadCheckpointError, match="incomplete"):
        ModelConfig.from_dict({k: v for k, v in published().to_dict().items() if k != "vae"})
