"""LoRA adapters at inference, against peft itself."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PARITY, relative
from safetensors.torch import load_file, save_file
from torch import nn

import mindomni_rt
from mindomni_rt import BadCheckpointError, BadRequestError, Pipeline
from mindomni_rt.backends.torch.adapters import CONFIG, WEIGHTS
from mindomni_rt.cli import main
from mindomni_rt.options import parse_adapter

SMALL: dict[str, Any] = dict(height=32, width=48, num_inference_steps=2, max_new_tokens=5, seed=1, output="numpy")
BUNDLE = Path(__file__).parents[2] / "assets" / "shapes-world-bundle"
TARGETS = r".*(decoder\.llm\.layers|language\.layers).*(qkv_proj|o_proj|q_proj|v_proj)"


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return mindomni_rt.load(PARITY, device="cpu", dtype="float32", fast=False)


def write(model: nn.Module, folder: Path, seed: int, **more: Any) -> nn.Module:
    """A random adapter saved by peft, and a copy of the model that peft runs with it."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    config = LoraConfig(**{"r": 3, "lora_alpha": 7, "target_modules": TARGETS, **more})
    adapted = get_peft_model(copy.deepcopy(model), config)
    torch.manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
        elif "modules_to_save" in name:
            parameter.data += 0.05 * torch.randn_like(parameter)
    adapted.save_pretrained(str(folder))
    assert any(isinstance(m, BaseTunerLayer) for m in adapted.modules())
    return adapted


@pytest.fixture(scope="module")
def folders(pipe: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    model, root = pipe.backend.model, tmp_path_factory.mktemp("adapters")  # type: ignore[attr-defined]
    kinds: dict[str, dict[str, Any]] = {
        "plain": {},
        "rslora": {"use_rslora": True},
        "patterns": {"rank_pattern": {r"language.layers.0.self_attn.q_proj": 5}, "alpha_pattern": {"o_proj": 2}},
        "saved": {"modules_to_save": ["connector.0"]},
    }
    return {name: (root / name, write(model, root / name, 1, **more)) for name, more in kinds.items()}


def run_with(pipe: Pipeline, adapted: Any) -> Any:
    """What the pipeline makes where peft's modules run in place of ours."""
    backend: Any = pipe.backend
    before, backend.model = backend.model, adapted.get_base_model()
    try:
        return Pipeline(backend, PARITY).generate("two cats", **SMALL)
    finally:
        backend.model = before


@pytest.mark.parametrize("kind", ["plain", "rslora", "patterns"])
def test_what_peft_computes(pipe: Pipeline, folders: dict[str, Any], kind: str) -> None:
    folder, adapted = folders[kind]
    plain = pipe.generate("two cats", **SMALL)
    wanted = run_with(pipe, adapted)
    name = pipe.load_adapter(folder)
    found = pipe.generate("two cats", **SMALL)
    pipe.unload_adapter(name)
    assert found.text == wanted.text and relative(found.images, wanted.images) < 1e-4
    assert relative(plain.images, wanted.images) > 1e-2
    assert found.settings["adapters"] == {kind: 1.0} and pipe.adapters == {}
    assert pipe.generate("two cats", **SMALL) == plain


def test_parts_that_were_trained_whole(pipe: Pipeline, folders: dict[str, Any]) -> None:
    folder, adapted = folders["saved"]
    model: Any = pipe.backend.model  # type: ignore[attr-defined]
    merged = adapted.merge_and_unload()
    name = pipe.load_adapter(folder)
    found = {n: p.detach().clone() for n, p in model.named_parameters()}
    pipe.unload_adapter(name)
    for wanted_name, wanted in merged.named_parameters():
        assert relative(found[wanted_name], wanted.detach()) < 1e-6, wanted_name


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_unloading_restores_every_bit(folders: dict[str, Any], dtype: str) -> None:
    pipe = mindomni_rt.load(PARITY, device="cpu", dtype=dtype, fast=False)
    model: Any = pipe.backend.model  # type: ignore[attr-defined]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    pipe.load_adapter(folders["plain"][0], name="a")
    pipe.load_adapter(folders["saved"][0], name="b", scale=0.3)
    weight = model.language.layers[0].self_attn.q_proj.weight
    assert weight.dtype == before["language.layers.0.self_attn.q_proj.weight"].dtype
    assert not torch.equal(weight, before["language.layers.0.self_attn.q_proj.weight"])
    pipe.set_adapter_scale("a", -2.0)
    assert pipe.adapters == {"a": -2.0, "b": 0.3}
    pipe.set_adapter_scale("b", 0)
    pipe.unload_adapter("a")
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    pipe.unload_adapter("b")
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_scale_and_sum_are_float32_rounded_once(folders: dict[str, Any]) -> None:
    pipe = mindomni_rt.load(PARITY, device="cpu", dtype="bfloat16", fast=False)
    model: Any = pipe.backend.model  # type: ignore[attr-defined]
    base = model.decoder.llm.layers[0].self_attn.o_proj.weight.detach().clone()
    tensors = load_file(folders["plain"][0] / WEIGHTS)
    a, b = (tensors[f"base_model.model.decoder.llm.layers.0.self_attn.o_proj.lora_{x}.weight"] for x in "AB")
    pipe.load_adapter(folders["plain"][0], scale=0.5)
    wanted = (base.double() + 0.5 * 7 / 3 * b.double() @ a.double()).bfloat16()
    found = model.decoder.llm.layers[0].self_attn.o_proj.weight
    assert (found == wanted).float().mean() > 0.999  # double and single may round a tie apart


def damaged(source: Path, folder: Path, config: dict[str, Any], change: Callable[[dict[str, Any]], None]) -> Path:
    shutil.copytree(source, folder)
    data = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**data, **config}))
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    return folder


def _nothing(tensors: dict[str, Any]) -> None:
    pass


def _lone(tensors: dict[str, Any]) -> None:
    del tensors[sorted(n for n in tensors if "lora_A" in n)[0]]


def _stranger(tensors: dict[str, Any]) -> None:
    tensors["base_model.model.other.lora_A.weight"] = torch.zeros(3, 4)


def _narrow(tensors: dict[str, Any]) -> None:
    name = sorted(n for n in tensors if "lora_A" in n)[0]
    tensors[name] = tensors[name][:, :-1].contiguous()


def _nan(tensors: dict[str, Any]) -> None:
    tensors[sorted(tensors)[0]][0, 0] = float("nan")


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        ({"peft_type": "LOHA"}, _nothing, "peft_type = 'LOHA'"),
        ({"use_dora": True}, _nothing, "use_dora"),
        ({"bias": "all"}, _nothing, "bias"),
        ({"r": 4}, _nothing, "with rank 4 needs lora_A"),
        ({"r": "x"}, _nothing, "r = 'x'"),
        ({"lora_alpha": None}, _nothing, "lacks 'lora_alpha'"),
        ({"lora_alpha": True}, _nothing, "lora_alpha = True: expected a finite number"),
        ({"lora_alpha": 10**400}, _nothing, "lora_alpha = 1000"),
        ({"rank_pattern": {"(a*)*b": 3}}, _nothing, "rank_pattern = .*: expected names of modules"),
        ({"rank_pattern": {"(.|..)" * 30: 3}}, _nothing, "rank_pattern"),
        ({"alpha_pattern": {r".*.*.*x": 3}}, _nothing, "alpha_pattern"),
        ({"alpha_pattern": {"(x": 3}}, _nothing, "alpha_pattern = .*'\\(x' is none"),
        ({}, _lone, "lora_B alone"),
        ({}, _stranger, "no weight other.weight; the adapter belongs to another model"),
        ({}, _narrow, "needs lora_A"),
        ({}, _nan, "no finite"),
        ({}, dict.clear, "holds no tensors"),
    ],
)
def test_adapters_that_do_not_fit(
    pipe: Pipeline, folders: dict[str, Any], tmp_path: Path, config: dict[str, Any], change: Any, message: str
) -> None:
    folder = damaged(folders["plain"][0], tmp_path / "a", config, change)
    before = pipe.generate("x", **SMALL)
    with pytest.raises(BadCheckpointError, match=message):
        pipe.load_adapter(folder)
    assert pipe.adapters == {} and pipe.generate("x", **SMALL) == before


def test_mistakes_are_named(pipe: Pipeline, folders: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(BadCheckpointError, match="no such folder"):
        pipe.load_adapter(tmp_path / "none")
    with pytest.raises(BadCheckpointError, match=r"adapter_config\.json is missing"):
        pipe.load_adapter(tmp_path)
    for scale in (float("nan"), "1", True):
        with pytest.raises(BadRequestError, match="scale = "):
            pipe.load_adapter(folders["plain"][0], scale=scale)  # type: ignore[arg-type]
    pipe.load_adapter(folders["plain"][0], name="a")
    with pytest.raises(BadRequestError, match="'a' is loaded already"):
        pipe.load_adapter(folders["plain"][0], name="a")
    with pytest.raises(BadRequestError, match="no adapter 'b'; loaded are: a"):
        pipe.set_adapter_scale("b", 1.0)
    pipe.unload_adapter("a")
    with pytest.raises(BadRequestError, match="loaded are: none"):
        pipe.unload_adapter("a")


def test_other_backends_refuse_by_name(folders: dict[str, Any]) -> None:
    for source, fast, name in ((BUNDLE, None, "backend 'onnx'"), (PARITY, True, "the fast path")):
        other = mindomni_rt.load(source, device="cpu", fast=fast)
        with pytest.raises(BadRequestError, match=f"{name} takes no adapters"):
            other.load_adapter(folders["plain"][0])
        assert other.adapters == {}


def test_the_command(folders: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        parse_adapter("a:0.5") == ("a", 0.5) and parse_adapter("C:x") == ("C:x", 1.0) and parse_adapter("a") == ("a", 1)
    )
    common = ["generate", "two cats", "--size", "48x32", "--steps", "1", "--max-new-tokens", "2", "--seed", "1"]
    made = []
    for adapter in ([], ["--adapter", f"{folders['plain'][0]}:0.5"]):
        out = tmp_path / f"{len(adapter)}.png"
        assert main([*common, "--model", str(PARITY), "--device", "cpu", "--out", str(out), *adapter]) == 0
        made.append((out.read_bytes(), mindomni_rt.read_settings(out)))
    assert made[0][0] != made[1][0] and made[1][1]["adapters"] == {"plain": 0.5}
    capsys.readouterr()
    assert main([*common, "--model", str(BUNDLE), "--out", str(tmp_path / "c.png"), "--adapter", "a"]) == 2
    assert "adapters need a checkpoint" in capsys.readouterr().err
