"""16-bit weights with float32 arithmetic: as exact as float32, in the memory of 16 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PARITY, relative
from torch import nn

import mindomni_rt
from mindomni_rt.backends.torch import widen as widening
from mindomni_rt.backends.torch.widen import WideEmbedding, WideLinear, widen
from mindomni_rt.memory.machine import Machine
from mindomni_rt.model.mindomni import load_model
from mindomni_rt.model.save import save_model

SMALL: dict[str, Any] = dict(height=32, width=48, num_inference_steps=3, max_new_tokens=6, seed=1, output="numpy")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [0, 1, 4, 5, 33])
@pytest.mark.parametrize("bias", [False, True])
def test_products(dtype: torch.dtype, rows: int, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(widening, "SLICE", 7 * 24)  # seven rows of the weight at a time, the last slice shorter
    torch.manual_seed(rows)
    linear = nn.Linear(24, 37, bias=bias).to(dtype).requires_grad_(False)
    x = torch.randn(1, rows, 24)
    found = WideLinear(linear, widening.FEW)(x)
    assert found.dtype == torch.float32 and found.shape == (1, rows, 37)
    exact = x.double() @ linear.weight.double().T + (linear.bias.double() if bias else 0)
    bound = 2e-6 if rows > widening.FEW else 2 * torch.finfo(dtype).eps
    assert rows == 0 or relative(found, exact) < bound


def test_only_products_and_tables_stay_narrow() -> None:
    model, _ = load_model(PARITY, torch.bfloat16, vae_dtype=torch.float32)
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    widen(model)
    for name, module in model.named_modules():
        wide = isinstance(module, WideLinear | WideEmbedding)
        for key, parameter in module.named_parameters(recurse=False):
            narrow = wide and key == "weight"
            assert parameter.dtype == (torch.bfloat16 if narrow else torch.float32), (name, key)
            if narrow:
                assert parameter.data_ptr() == before[f"{name}.{key}"]  # the mapped tensor, not a copy
    assert not any(type(m) is nn.Linear and m.weight.dtype != torch.float32 for m in model.modules())


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The parity checkpoint, stored in bfloat16."""
    folder = tmp_path_factory.mktemp("stored") / "model"
    model, _ = load_model(PARITY, torch.bfloat16)
    save_model(model, folder, PARITY)
    return folder


@pytest.mark.parametrize("fast_products", [False, True])
def test_a_request_is_that_of_float32(stored: Path, fast_products: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = mindomni_rt.load(stored, device="cpu", dtype="float32")
    monkeypatch.setattr(
        "mindomni_rt.backends.torch.backend.read_machine", lambda **_: Machine(host=None, bfloat16=fast_products)
    )
    pipe = mindomni_rt.load(stored, device="cpu", dtype="bfloat16")
    assert pipe.backend.dtype == "bfloat16"
    assert pipe.backend.torch_dtype == (torch.bfloat16 if fast_products else torch.float32)
    painted = [p.generate("two cats", think=False, **SMALL).latents for p in (pipe, exact)]
    assert (relative(*painted) < 2e-5) == (not fast_products)
    thought = [p.generate("two cats", **SMALL) for p in (pipe, exact)]
    assert relative(thought[0].latents, thought[1].latents) < 2e-2
    words = {**SMALL, "max_new_tokens": 12}
    drafted = pipe.generate("two cats and two cats", **words, draft_tokens=3)  # rows of a draft share a pass
    assert drafted.text == pipe.generate("two cats and two cats", **words).text
    scene = PARITY / "cases" / "scene.png"
    edited = [p.generate("two cats", image=scene, think=False, **SMALL).latents for p in (pipe, exact)]
    assert (relative(*edited) < 2e-5) == (not fast_products)
