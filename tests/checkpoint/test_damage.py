"""Checkpoints with odd files and values: each is refused by name, before anything is allocated."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PARITY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from mindomni_rt.checkpoint.config import ModelConfig, RecommendedConfig
from mindomni_rt.checkpoint.dump import config_files
from mindomni_rt.checkpoint.layout import open_checkpoint, resolve
from mindomni_rt.checkpoint.parse import own_config
from mindomni_rt.checkpoint.pickled import read_pickled_header
from mindomni_rt.errors import BadCheckpointError


def _own(**recommended: Any) -> dict[str, Any]:
    """mindomni.json with these settings."""
    return {"edit_features": "vit", "recommended": recommended}


DEEP = "[" * 100_000
MISSING = object()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for part in ("mllm", "image_decoder", "vae"):
        shutil.copytree(PARITY / part, tmp_path / part)
    shutil.copy(PARITY / "connector.safetensors", tmp_path)
    return tmp_path


FILES = [
    "mllm/config.json", "mllm/generation_config.json", "mllm/preprocessor_config.json", "image_decoder/config.json",
    "vae/config.json", "mindomni.json", "mllm/processor_config.json",
]  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "text", [DEEP, '{"a": ' + "1" * 5000 + "}", '{"a": NaN}', '{"a": -Infinity}', "7", '"x"', "\xff"]
)
def test_json_that_is_none(folder: Path, name: str, text: str) -> None:
    (folder / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(BadCheckpointError, match=Path(name).name):
        open_checkpoint(folder)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("name", [*FILES, "connector.safetensors", "mllm/model.safetensors", "image_decoder/model.pt"])
def test_pipes_devices_and_folders(folder: Path, name: str) -> None:
    path = folder / name
    for make in (lambda: os.mkfifo(path), path.mkdir, lambda: path.symlink_to("/dev/zero")):
        path.unlink(missing_ok=True)
        if name.endswith(".pt"):
            (folder / "image_decoder/model.safetensors").unlink(missing_ok=True)
        make()
        with pytest.raises(BadCheckpointError, match=r"regular file|expected a file"):
            open_checkpoint(folder)
        if path.is_dir():
            path.rmdir()


VALUES = [None, True, -1, 0, 0.5, 10**9, 10**30, "x", [], {}, [1], "1" * 3000]


def leaves(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(data, dict):
        return (
            [path, *(p for key in data for p in leaves(data[key], (*path, key)))]
            if path
            else [p for key in data for p in leaves(data[key], (key,))]
        )
    return [path]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_anywhere_is_read_or_refused(folder: Path, data: st.DataObject) -> None:
    """No other exception, and no size beyond what the tensors hold."""
    name = data.draw(st.sampled_from(FILES[:5]))
    content = json.loads((PARITY / name).read_text(encoding="utf-8"))
    path = data.draw(st.sampled_from(leaves(content)))
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = data.draw(st.sampled_from(VALUES))
    (folder / name).write_text(json.dumps(content))
    try:
        config = open_checkpoint(folder).config
    except BadCheckpointError as error:
        assert len(str(error)) < 1000  # noqa: PT017 some values are read
    else:
        assert config.language.stack.num_layers <= 1024 and config.vae.scaling_factor > 0
    finally:
        shutil.copy(PARITY / name, folder / name)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("vae/config.json", {"scaling_factor": 0}, "scaling_factor = 0"),
        ("mllm/generation_config.json", {"repetition_penalty": 0}, "generation_config.*repetition_penalty = 0"),
        ("mllm/generation_config.json", {"repetition_penalty": "x"}, "generation_config.*repetition_penalty = 'x'"),
        ("mllm/generation_config.json", {"no_repeat_ngram_size": 3}, "no_repeat_ngram_size = 3"),
        ("mllm/generation_config.json", {"eos_token_id": 400}, "eos_token_id 400 is outside"),
        ("mllm/generation_config.json", {"eos_token_id": [True]}, "eos_token_id"),
        ("mllm/preprocessor_config.json", {"image_std": [0, 1, 1]}, "image_std"),
        ("mllm/preprocessor_config.json", {"image_mean": [0, 1]}, "image_mean"),
        ("mllm/preprocessor_config.json", {"min_pixels": 10**7}, "min_pixels"),
        ("mllm/preprocessor_config.json", {"max_pixels": True}, "max_pixels = True"),
        ("mllm/config.json", {"num_hidden_layers": 10**9}, "num_layers = 1000000000"),
        ("mllm/config.json", {"image_token_id": 330}, "image_token_id = 330: expected below"),
        ("mllm/config.json", {"model_type": "qwen3_vl"}, "model_type = 'qwen3_vl'"),
        ("image_decoder/config.json", {"model_type": "llama"}, "model_type = 'llama'"),
        ("mindomni.json", {"edit_features": "all"}, "mindomni.json: edit_features = 'all'"),
        ("mindomni.json", {"edit_featurs": "vit+vae"}, "unknown keys"),
        ("mindomni.json", _own(width=100), "mindomni.json: RecommendedConfig: width = 100: expected a multiple of 16"),
        ("mindomni.json", _own(num_inference_steps=0), "num_inference_steps = 0: expected .* from 1 to 1000"),
        ("mindomni.json", _own(guidance_scale="3"), "guidance_scale = '3'"),
        ("mindomni.json", _own(trained_sides=[96]), "trained_sides = "),
        ("mindomni.json", _own(trained_sides=[512, 256]), "expected the least first"),
        ("mindomni.json", _own(trained_sides=[512, 512]), "width = 1024, height = 1024: expected within trained_sides"),
        ("mindomni.json", _own(stepps=3), "RecommendedConfig: unknown keys"),
        ("mindomni.json", {"edit_features": "vit", "recommended": [1]}, "recommended = .*expected an object"),
    ],
)
def test_values_that_would_change_pictures(folder: Path, file: str, changes: dict[str, Any], message: str) -> None:
    path = folder / file
    data = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(data | changes))
    with pytest.raises(BadCheckpointError, match=message):
        open_checkpoint(folder)


def test_recommended_settings_are_read_and_written(folder: Path, tmp_path: Path) -> None:
    assert open_checkpoint(folder).config.recommended == RecommendedConfig()
    (folder / "mindomni.json").write_text(json.dumps(_own(width=96, height=48, trained_sides=[48, 96])))
    config = open_checkpoint(folder).config
    assert config.recommended == RecommendedConfig(width=96, height=48, trained_sides=(48, 96))
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    (tmp_path / "mindomni.json").write_text(json.dumps(config_files(config)["mindomni.json"]))
    assert own_config(tmp_path / "mindomni.json")["recommended"] == config.recommended


def test_an_edit_mode_that_got_lost(folder: Path) -> None:
    """A tokenizer with VAE features and no mindomni.json: which edits it was trained for is not guessed."""
    assert open_checkpoint(folder).config.edit_features == "vit"
    tokenizer = json.loads((folder / "mllm/tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][-1], "id": 330, "content": "<|latent_pad|>"})
    (folder / "mllm/tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(BadCheckpointError, match=r"mindomni\.json is missing"):
        open_checkpoint(folder)
    for features in ("vit", "vit+vae"):
        (folder / "mindomni.json").write_text(json.dumps({"edit_features": features}))
        assert open_checkpoint(folder).config.edit_features == features


@pytest.mark.parametrize("escaped", [False, True])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "added_tokens.json", "vocab.json"])
def test_an_edit_mode_that_got_lost_in_any_spelling(folder: Path, name: str, escaped: bool) -> None:
    data = json.loads((folder / "mllm" / name).read_text(encoding="utf-8"))
    text = json.dumps({**data, "<|latent_pad|>": 329})
    (folder / "mllm" / name).write_text(text.replace("<|latent", r"\u003C\u007clatent") if escaped else text)
    with pytest.raises(BadCheckpointError, match=r"mindomni\.json is missing"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "weight_map",
    [{"a": 3}, {"a": None}, {"a": "../x.safetensors"}, {"a": "x" * 300 + ".safetensors"}, {"a": "config.json"}, [], 7,
     {"a": ["model.safetensors"]}, {"a": "c:\\x.safetensors"}],
)  # fmt: skip
def test_indexes_of_odd_entries(folder: Path, weight_map: Any) -> None:
    (folder / "mllm/model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(BadCheckpointError, match=r"index\.json"):
        open_checkpoint(folder)


@pytest.mark.parametrize("path", ["x" * 300, "a\0b", "~nobody-has-this-name", 7, None, b"x", "/dev/zero"])
def test_paths_that_are_none(path: Any) -> None:
    with pytest.raises(BadCheckpointError):
        resolve(path)


def pickled(folder: Path, content: Any, **options: Any) -> Path:
    path = folder / "image_decoder" / "model.pt"
    torch.save(content, path, **options)
    return path


def test_headers_of_pickled_weights_are_those_of_torch(folder: Path) -> None:
    state = load_file(folder / "image_decoder/model.safetensors")
    names = list(state)
    state[names[0]], state[names[1]] = state[names[0]].half(), state[names[1]].bfloat16()
    state["shared"] = state[names[2]][:1]
    for content in (state, torch.nn.Linear(3, 2).state_dict()):
        found = read_pickled_header(pickled(folder, content))
        short = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
        assert found == {name: (short[t.dtype], tuple(t.shape)) for name, t in content.items()}


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch pwned",)


@pytest.mark.parametrize(
    "content",
    [{"x": Evil()}, [torch.zeros(1)], {"x": {"y": torch.zeros(1)}}, {"x": 3}, {1: torch.zeros(1)}, torch.zeros(1),
     {"x": torch.nn.Linear(1, 1)}],
    ids=lambda c: type(c).__name__,
)  # fmt: skip
def test_pickles_of_anything_else_are_refused(folder: Path, content: Any) -> None:
    with pytest.raises(BadCheckpointError, match=r"model\.pt"):
        read_pickled_header(pickled(folder, content))
    assert not Path("pwned").exists()


def zipped(path: Path, program: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", program)
    return path


@pytest.mark.parametrize(
    "program",
    [b"", b".", b"}.", b"\x80\x02]q\xff.", pickle.dumps(print), pickle.dumps({"x": 1}), b"r\xff\xff\xff\x7f.",
     b"}" + b"r\xff\xff\xff\x7f" + b"X\xff\xff\xff\x7f", b"\x96" + b"\xff" * 8 + b".", b"cos\nsystem\n(S'x'\ntR.",
     b"ctorch._utils\n_rebuild_tensor_v2\n)R.", b"(" * 1000 + b"t."],
    ids=range(12),
)  # fmt: skip
def test_programs_that_describe_no_tensors(tmp_path: Path, program: bytes) -> None:
    path = zipped(tmp_path / "model.pt", program)
    try:
        assert read_pickled_header(path) == {}
    except BadCheckpointError as error:
        assert "model.pt" in str(error)  # noqa: PT017 an empty dictionary is fine too


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_bytes_break_the_reader_of_pickles(tmp_path: Path, data: st.DataObject) -> None:
    source = tmp_path / "whole.pt"
    torch.save({"x": torch.zeros(2, 3), "y": torch.zeros(1)}, source)
    with zipfile.ZipFile(source) as archive:
        program = bytearray(archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl"))))
    for _ in range(data.draw(st.integers(1, 6))):
        program[data.draw(st.integers(0, len(program) - 1))] = data.draw(st.integers(0, 255))
    attempt: Callable[[], Any] = lambda: read_pickled_header(zipped(tmp_path / "model.pt", bytes(program)))  # noqa: E731
    try:
        attempt()
    except BadCheckpointError as error:
        assert "model.pt" in str(error)  # noqa: PT017 some changes are harmless
