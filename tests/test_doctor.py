"""`mindomni doctor` on made-up machines, and without torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PARITY

from mindomni_rt import doctor
from mindomni_rt.checkpoint.config import published
from mindomni_rt.checkpoint.layout import PARTS, Checkpoint, TensorEntry
from mindomni_rt.cli import main
from mindomni_rt.memory.gpus import Gpu
from mindomni_rt.memory.host import HostMemory
from mindomni_rt.memory.machine import Machine
from mindomni_rt.memory.speed import cpu_rates, predict_cpu, predict_gpu

ROOT = Path(__file__).parents[1]
BUNDLE = ROOT / "assets" / "shapes-world-bundle"
CARD = Gpu(index=0, name="NVIDIA GeForce RTX 4090", capability=(8, 9), total=24 * 10**9, free=23 * 10**9)
LAPTOP = Machine(host=HostMemory(24 * 10**9, 21 * 10**9), cpu="Laptop", cores=8, bfloat16=True)


def published_checkpoint(path: Path) -> Checkpoint:
    tensors = {part: {"x": TensorEntry(Path("x"), "x", "BF16", (2, 2))} for part in PARTS}
    return Checkpoint(path, published(), tensors, (), ())


def test_a_laptop_and_the_published_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("mindomni_rt.checkpoint.layout.open_checkpoint", published_checkpoint)
    found = doctor.examine(tmp_path, LAPTOP)
    text = str(found)
    assert "Laptop, 8 cores, multiplies bfloat16 at speed" in text and "21.00 GB of 24.00 GB free" in text
    assert "gpu      none found" in text
    assert "cpu: cpu, bfloat16: the stored type, mapped from the file; predicted peak 15.0" in text
    assert "prediction: " in text and "s a token" in text
    data = json.loads(json.dumps(found.to_dict()))
    assert data["model"]["devices"]["cpu"]["fit"]["dtype"] == "bfloat16"


def test_a_card_and_a_small_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("mindomni_rt.checkpoint.layout.open_checkpoint", published_checkpoint)
    small = Machine(host=HostMemory(16 * 10**9, 12 * 10**9), cpu="Small", gpus=(CARD,))
    text = str(doctor.examine(tmp_path, small))
    assert "cuda:0   NVIDIA GeForce RTX 4090 (sm_89), 23.00 GB of 24.00 GB free" in text
    assert "cuda:0: cuda:0, bfloat16" in text
    assert "--target cpu --precision int8" in text  # what the host could run instead


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    present = {"numpy", "onnxruntime"}
    monkeypatch.setattr(doctor, "_present", lambda module: module in present)
    monkeypatch.setattr("mindomni_rt.extras.satisfied", lambda _: False)
    found = doctor.examine(machine=LAPTOP)
    assert found.backends["onnx"]["lacks"] == []
    assert found.backends["torch"]["lacks"] == ["torch", "safetensors", "huggingface_hub"]
    install = 'pip install "tensorrt-rtx>=1.7" "cuda-core>=1.0" "cuda-bindings>=13" tqdm'
    assert f"tensorrt  lacks tensorrt_rtx, cuda.core, cuda.bindings: {install} (" in str(found)


def test_folders_follow_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HF_HUB_CACHE", "TRITON_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "cache" / "mindomni-rt" / "engines").mkdir(parents=True)
    (tmp_path / "cache" / "mindomni-rt" / "engines" / "x.plan").write_bytes(b"12345")
    folders = doctor.examine(machine=LAPTOP).folders
    assert folders["downloads"] == {"path": str(tmp_path / "hf" / "hub"), "bytes": None}
    assert folders["triton"]["path"] == str(tmp_path / "triton")
    assert folders["own cache"] == {"path": str(tmp_path / "cache" / "mindomni-rt"), "bytes": 5}


def test_models_that_are_here(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for model, kind in ((PARITY, "checkpoint"), (BUNDLE, "bundle")):
        assert main(["doctor", "--model", str(model), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)["model"]
        assert found["kind"] == kind and found["devices"]["cpu"]["fits"]
    assert main(["doctor", "--model", str(tmp_path / "nothing")]) == 0
    assert "cannot be read: no folder at" in capsys.readouterr().out
    assert main(["doctor"]) == 0
    assert "backends" not in capsys.readouterr().err


def test_predictions(monkeypatch: pytest.MonkeyPatch) -> None:
    rate, bandwidth = cpu_rates()
    assert rate > 0 and bandwidth > 0
    monkeypatch.setattr("mindomni_rt.memory.speed.cpu_rates", lambda: (rate, bandwidth))  # the same for both below
    half, full = predict_cpu(published(), "bfloat16"), predict_cpu(published(), "float32")
    assert half is not None and full is not None and half.token < full.token
    card = predict_gpu(published(), "bfloat16", CARD.name)
    # A token reads 14.1 GB (weights without the input table): at 1008 GB/s no less than 0.014 s.
    assert card is not None and 0.014 < card.token < 0.03 and card.step * 50 < card.total
    assert predict_gpu(published(), "bfloat16", "Abacus 3000") is None


def test_it_needs_no_torch() -> None:
    script = (
        "import sys\n"
        "for name in ('torch', 'safetensors', 'triton', 'onnx', 'huggingface_hub'):\n"
        "    sys.modules[name] = None\n"
        "from mindomni_rt.cli import main\n"
        f"code = main(['doctor', '--model', {str(BUNDLE)!r}])\nassert code == 0\n"
        f"sys.exit(main(['doctor', '--model', {str(PARITY)!r}]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=100, check=True
    )
    assert "lacks torch" in done.stdout and "bundle\n  recommends 96x96, 10 steps" in done.stdout
    assert "\n  cpu: cpu, float32" in done.stdout
    assert "cannot be read: safetensors is not installed" in done.stdout
