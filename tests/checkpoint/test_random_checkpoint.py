"""Random checkpoints: names and shapes against the modules, files against safetensors, the whole by painting."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PARITY
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

import mindomni_rt
from mindomni_rt import BadRequestError
from mindomni_rt.checkpoint.config import ModelConfig, published
from mindomni_rt.checkpoint.layout import open_checkpoint
from mindomni_rt.cli import main
from mindomni_rt.inputs.prompts import Chat
from mindomni_rt.model.mindomni import MindOmniModel
from mindomni_rt.model.random.shapes import tensor_shapes
from mindomni_rt.model.random.write import bfloat16, cut, write_random_checkpoint

SMALL = cut(published(), layers=1, divide=16)


def as_read(config: ModelConfig) -> ModelConfig:
    """The configuration with what its files do not say: Qwen's rope has no original length."""
    stack = config.language.stack
    rope = replace(stack.rope, original_max_positions=stack.rope.max_positions)
    return replace(config, language=replace(config.language, stack=replace(stack, rope=rope)))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("random") / "checkpoint"
    told = []
    done = write_random_checkpoint(folder, SMALL, seed=3, shard_bytes=40_000_000, progress=told.append)
    assert sum(told) == done.bytes == 2 * done.parameters
    return folder


@pytest.mark.parametrize(
    "config",
    [published(), SMALL, cut(published(), layers=3, divide=2), open_checkpoint(PARITY).config],
    ids=["published", "small", "half", "parity"],
)
def test_names_and_shapes_are_those_of_the_modules(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = MindOmniModel(config)
    for part, found in tensor_shapes(config).items():
        expected = {name: tuple(t.shape) for name, t in getattr(model, part).state_dict().items()}
        if part == "language" and config.language.tie_embeddings:
            expected.pop("lm_head.weight")
        assert found == expected


def test_published_sizes_are_kept_without_a_cut() -> None:
    assert cut(published()) == published()
    assert cut(published(), layers=2).language.stack.num_layers == 2
    assert cut(published(), layers=2).connector.stack == published().connector.stack
    for values in ((0, 1), (1, 0), (-1, 1)):
        with pytest.raises(BadRequestError, match="1 or more"):
            cut(published(), *values)


@given(st.integers(1, 32), st.integers(1, 40))
def test_every_cut_is_a_valid_configuration(layers: int, divide: int) -> None:
    config = cut(published(), layers, divide)  # StackConfig checks that heads divide
    assert config.language.stack.head_dim == 128 and config.decoder.stack.head_dim == 96
    assert all(width % config.vae.norm_num_groups == 0 for width in config.vae.block_out_channels)
    assert config.language.vocab_size == published().language.vocab_size


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**100), max_value=2.0**100)))
def test_rounding_is_that_of_torch(values: list[float]) -> None:
    array = np.array(values, np.float32)
    ours = torch.from_numpy(bfloat16(array).view(np.int16)).view(torch.bfloat16)
    assert torch.equal(ours, torch.from_numpy(array).bfloat16())


def test_files_are_what_safetensors_reads(small: Path) -> None:
    assert open_checkpoint(small).config == as_read(SMALL)
    index = json.loads((small / "mllm" / "model.safetensors.index.json").read_text(encoding="utf-8"))
    names = sorted(set(index["weight_map"].values()))
    # Both embeddings take 152064 x 128 x 2 = 38.9 MB, so one shard of 40 MB holds no two of them.
    assert names == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert index["metadata"]["total_size"] == sum(
        e.shape[0] * int(np.prod(e.shape[1:])) * 2
        for part in ("vision", "language")
        for e in open_checkpoint(small).tensors[part].values()
    )
    with safe_open(small / "image_decoder" / "model.safetensors", framework="pt") as file:
        one, two = (file.get_tensor(f"llm.layers.0.self_attn.{n}_proj.weight").float() for n in ("qkv", "o"))
        norm = file.get_tensor("llm.norm.weight")
    assert torch.equal(norm, torch.ones_like(norm))
    # Normal numbers with variance 1 / fan-in, different from tensor to tensor and from row to row.
    assert one.std() * one.shape[1] ** 0.5 == pytest.approx(1, abs=0.02) and abs(one.mean()) < 1e-3
    assert abs(float(torch.nn.functional.cosine_similarity(one[: two.shape[0]], two).mean())) < 0.05
    assert len({tuple(row.tolist()) for row in one}) == one.shape[0]


def test_seed_decides(tmp_path: Path, small: Path) -> None:
    for seed in (3, 4):
        write_random_checkpoint(tmp_path / str(seed), SMALL, seed=seed)
    name = "connector.safetensors"
    assert (tmp_path / "3" / name).read_bytes() != (tmp_path / "4" / name).read_bytes()


def test_tokenizer_has_the_published_ids(small: Path) -> None:
    chat, language = Chat(small / "mllm"), published().language
    assert chat.token_id("<|image_pad|>") == language.image_token_id == 151655
    assert chat.token_id("<|vision_start|>") == language.vision_start_token_id
    assert chat.token_id("<|im_end|>") == 151645 and chat.token_id("<|endoftext|>") == 151643
    text = "Zeichne 3 Äpfel, 苹果 🍎!\n"
    ids = chat.tokenizer.encode(text).ids
    assert chat.decode(ids) == text and max(ids) < 151643
    assert len(chat.tokenizer.encode("draw a cat").ids) < 8
    assert chat.decode([150000]).strip().isalpha()


def test_it_loads_and_paints(small: Path) -> None:
    pipe = mindomni_rt.load(small, device="cpu", dtype="bfloat16")
    result = pipe.generate(
        "a cat", height=64, width=64, num_inference_steps=2, max_new_tokens=3, seed=1, output="numpy"
    )
    assert result.images.shape == (1, 64, 64, 3) and np.isfinite(result.images).all()
    assert result.images.std() > 0.01 and len(result.token_ids) == 3
    red = np.zeros((56, 56, 3), np.uint8)
    from PIL import Image

    assert pipe.understand("what is it?", Image.fromarray(red), max_new_tokens=2).token_ids


@pytest.mark.parametrize("how", [[], ["--json"], ["-q"]])
def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], how: list[str]) -> None:
    arguments = ["random-checkpoint", str(tmp_path / "x"), "--layers", "1", "--divide-width", "32", *how]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    if "--json" in how:
        assert json.loads(out)["config"]["language"]["vocab_size"] == 152064
    else:
        assert "random parameters" in out
    assert err.startswith("writing 0.") == (not how)
    if not how:  # the bytes are named before they are written
        written = sum(path.stat().st_size for path in (tmp_path / "x").rglob("*.safetensors"))
        assert abs(float(err.split()[1]) - written / 1e9) < 0.01
    assert main(arguments) == 2  # the folder is not empty
    assert capsys.readouterr().err.count("\n") == 1


def test_refusals(tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadRequestError, match="not an empty folder"):
        write_random_checkpoint(small, SMALL)
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000_000_000))
    with pytest.raises(BadRequestError, match=r"take 24\.6 GB, 10\.0 GB are free"):
        write_random_checkpoint(tmp_path / "full")
    assert not any((tmp_path / "full").iterdir())


def test_writing_needs_no_torch(tmp_path: Path) -> None:
    script = (
        "import sys\nsys.modules['torch'] = None\nfrom pathlib import Path\n"
        "from mindomni_rt.checkpoint.config import published\n"
        "from mindomni_rt.model.random.write import cut, write_random_checkpoint\n"
        f"write_random_checkpoint(Path({str(tmp_path / 'x')!r}), cut(published(), 1, 32))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=100)
    assert open_checkpoint(tmp_path / "x").config == as_read(cut(published(), 1, 32))
