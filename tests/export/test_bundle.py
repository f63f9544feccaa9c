"""Bundles: what damage, mismatch and killed builds do. Nothing may run before everything has been checked."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import PARITY

import mindomni_rt
from mindomni_rt import BadBundleError, BadRequestError, UnsupportedDeviceError
from mindomni_rt.bundle.manifest import MANIFEST, Manifest, open_bundle, read_manifest, safe_name, writing

Edit = Callable[[dict[str, Any]], object]


@pytest.fixture
def bundle(bundles: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(bundles("fp32"), tmp_path / "bundle"))


def edit(bundle: Path, change: Edit) -> None:
    data = json.loads((bundle / MANIFEST).read_text())
    change(data)
    (bundle / MANIFEST).write_text(json.dumps(data))


def test_a_copy_runs_anywhere(bundle: Path) -> None:
    before = mindomni_rt.load(bundle).understand("hello", max_new_tokens=4)
    moved = bundle.rename(bundle.with_name("elsewhere"))
    assert mindomni_rt.load(moved).understand("hello", max_new_tokens=4).token_ids == before.token_ids


def test_manifest_round_trip(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    assert Manifest.from_json(manifest.to_json(), bundle) == manifest
    files = {p.relative_to(bundle).as_posix() for p in bundle.rglob("*") if p.is_file()}
    assert files == {*manifest.files, MANIFEST}


def test_it_names_no_machine(bundle: Path) -> None:
    for path in bundle.rglob("*"):
        if path.is_file():
            assert str(Path.home()).encode() not in path.read_bytes() and b"/tmp/" not in path.read_bytes(), path


@pytest.mark.parametrize("name", ["denoiser.onnx", "decoder.data", "mllm/tokenizer.json", "vae.data"])
def test_one_flipped_bit_is_found(bundle: Path, name: str) -> None:
    data = bytearray((bundle / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / name).write_bytes(data)
    with pytest.raises(BadBundleError, match=rf"{name} is corrupt: its sha256 is"):
        mindomni_rt.load(bundle)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: f.write_bytes(f.read_bytes()[:-1]), "truncated"),
        (lambda f: f.write_bytes(b""), "truncated: 0 bytes"),
        (lambda f: f.write_bytes(f.read_bytes() + b"\0"), "too long"),
        (Path.unlink, "is missing"),
    ],
)
def test_lengths(bundle: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(bundle / "language.data")
    with pytest.raises(BadBundleError, match=message):
        mindomni_rt.load(bundle)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format=99), "format 99, this version reads 1"),
        (lambda m: m.pop("format"), "lacks 'format'"),
        (lambda m: m.pop("graphs"), "incomplete"),
        (lambda m: m.update(surprise=1), "unknown keys"),
        (lambda m: m.update(runtime="coreml"), "runtime 'coreml'"),
        (lambda m: m["files"].pop("vae.onnx"), "needs vae.onnx, which has no hash"),
        (lambda m: m["files"]["vae.onnx"].update(sha256="0"), "not a sha256"),
        (lambda m: m["files"]["vae.onnx"].update(bytes="many"), "not a size"),
        (lambda m: m["graphs"]["vae"].update(stage="upscaler"), "stage 'upscaler'"),
        (lambda m: m["model"].update(mystery=1), "mystery"),
        (lambda m: m.update(files=[]), "incomplete"),
    ],
)
def test_manifests_that_lie(bundle: Path, change: Edit, message: str) -> None:
    edit(bundle, change)
    with pytest.raises(BadBundleError, match=message):
        mindomni_rt.load(bundle)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00\xff"])
def test_manifests_that_are_none(bundle: Path, text: str) -> None:
    (bundle / MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(BadBundleError):
        mindomni_rt.load(bundle)


@pytest.mark.parametrize("name", ["../escape", "/etc/passwd", "a/../../b", "", "c:\\x", "a\\b"])
def test_names_that_lead_out(name: str) -> None:
    with pytest.raises(BadBundleError, match="relative path inside"):
        safe_name(name)


def test_a_link_that_leads_out(bundle: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.onnx"
    shutil.move(bundle / "vae.onnx", outside)
    (bundle / "vae.onnx").symlink_to(outside)
    with pytest.raises(BadBundleError, match="leads out of the bundle"):
        mindomni_rt.load(bundle)


def test_a_graph_cannot_read_files_beside_the_bundle(bundle: Path) -> None:
    """ONNX refers to weights by path; one that is not listed is refused by the manifest check on `data`."""
    edit(bundle, lambda m: m["graphs"]["vae"].update(data=["../secret.data"]))
    with pytest.raises(BadBundleError, match="has no hash"):
        mindomni_rt.load(bundle)


def test_backend_and_type_may_only_agree(bundle: Path) -> None:
    with pytest.raises(BadRequestError, match="bundle for backend 'onnx'"):
        mindomni_rt.load(bundle, backend="torch")
    with pytest.raises(BadRequestError, match="computes in float32"):
        mindomni_rt.load(bundle, dtype="bfloat16")
    with pytest.raises(BadRequestError, match="is a checkpoint"):
        mindomni_rt.load(PARITY, backend="onnx")
    with pytest.raises(BadRequestError, match="device 'tpu'"):
        mindomni_rt.load(bundle, device="tpu")
    with pytest.raises(UnsupportedDeviceError, match="onnxruntime offers"):
        mindomni_rt.load(bundle, device="cuda")


def test_a_killed_build_leaves_nothing_under_the_name(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    command = [sys.executable, "-m", "export", "build", str(PARITY), "--target", "cpu", "--out", str(out)]
    build = subprocess.Popen(command, cwd=Path(__file__).parents[2], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".bundle.partial-*/*.onnx")):
        assert build.poll() is None, build.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(build.pid, signal.SIGKILL)
    build.wait()
    assert not out.exists()
    (half,) = tmp_path.glob(".bundle.partial-*")
    with pytest.raises(BadBundleError, match="stopped half-way"):
        mindomni_rt.load(half)


def test_only_bundles_and_empty_folders_are_replaced(tmp_path: Path) -> None:
    def attempt(overwrite: bool) -> None:
        with writing(tmp_path / "out", overwrite) as folder:
            (folder / MANIFEST).write_text("{}")

    (tmp_path / "out").mkdir()
    attempt(False)
    with pytest.raises(BadBundleError, match="--overwrite"):
        attempt(False)
    attempt(True)
    (tmp_path / "out" / MANIFEST).unlink()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(BadBundleError, match="will not be overwritten"):
        attempt(True)
    assert (tmp_path / "out" / "thesis.tex").exists()


def test_what_appears_during_a_build_is_not_replaced(tmp_path: Path) -> None:
    """Two builds of one name, or a user's folder of that name: the second to come is refused."""
    for overwrite in (False, True):
        with pytest.raises(BadBundleError, match=r"exists"), writing(tmp_path / "out", overwrite) as folder:
            (folder / MANIFEST).write_text("{}")
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "thesis.tex").write_text("years of work")
        assert [p.name for p in tmp_path.iterdir()] == ["out"] and (tmp_path / "out" / "thesis.tex").exists()
        shutil.rmtree(tmp_path / "out")
    with pytest.raises(BadBundleError, match=r"exists; choose"), writing(tmp_path / "out") as first:
        (first / MANIFEST).write_text("first")
        with writing(tmp_path / "out") as second:
            (second / MANIFEST).write_text("second")
    assert (tmp_path / "out" / MANIFEST).read_text() == "second"


def test_control_c_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    command = [sys.executable, "-m", "export", "build", str(PARITY), "--target", "cpu", "--out", str(out)]
    # A shell that starts the tests in the background has them ignore SIGINT, and a child would inherit that.
    build = subprocess.Popen(
        command,
        cwd=Path(__file__).parents[2],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 240
    while not list(tmp_path.glob(".bundle.partial-*/*.onnx")):
        assert build.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    build.send_signal(signal.SIGINT)
    error = build.communicate(timeout=120)[1]
    assert build.returncode == 130 and error == "error: interrupted\n", error
    assert [p.name for p in tmp_path.iterdir()] == ["bundle.build.log"]


def test_a_failing_build_keeps_the_old_bundle(bundle: Path) -> None:
    before = read_manifest(bundle)
    with pytest.raises(OSError, match="disk"), writing(bundle, overwrite=True) as folder:
        (folder / "vae.onnx").write_bytes(b"half")
        raise OSError(28, "no space left on disk")
    assert open_bundle(bundle).manifest == before
    assert not list(bundle.parent.glob(".*partial*"))


def test_a_bundle_runs_without_torch(bundle: Path) -> None:
    """The same picture in a process where torch, transformers and safetensors cannot be imported."""
    script = """
import sys
for name in ("torch", "transformers", "safetensors", "onnx", "onnxscript", "huggingface_hub"):
    sys.modules[name] = None
import numpy as np, mindomni_rt
pipe = mindomni_rt.load(sys.argv[1])
result = pipe.generate("two cats", height=32, width=48, num_inference_steps=2, max_new_tokens=6, seed=1, output="numpy")
np.save(sys.argv[2], result.images)
"""
    out = bundle.parent / "picture.npy"
    subprocess.run(
        [sys.executable, "-c", script, str(bundle), str(out)], check=True, cwd=Path(__file__).parents[2], timeout=120
    )
    reference = mindomni_rt.load(PARITY, device="cpu").generate(
        "two cats", height=32, width=48, num_inference_steps=2, max_new_tokens=6, seed=1, output="numpy"
    )
    assert np.abs(np.load(out) - reference.images).max() < 1 / 255
