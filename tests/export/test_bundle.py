"""Bundles: what damage, mismatch and killed builds do. Nothing may run before everything has been checked."""

from __future__ import annotations

import contextlib
import json
import os
import re
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
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mindomni_rt
from mindomni_rt import BadBundleError, BadRequestError, UnsupportedDeviceError
from mindomni_rt.bundle.manifest import MANIFEST, Manifest, open_bundle, read_manifest, safe_name, sha256
from mindomni_rt.bundle.onnx_file import read_onnx
from mindomni_rt.bundle.reseal import reseal, sealed_json
from mindomni_rt.bundle.writing import writing

Edit = Callable[[dict[str, Any]], object]


@pytest.fixture
def bundle(bundles: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(bundles("fp32"), tmp_path / "bundle"))


def edit(bundle: Path, change: Edit) -> None:
    data = json.loads((bundle / MANIFEST).read_text())
    change(data)
    (bundle / MANIFEST).write_text(sealed_json(data))


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


def test_damage_of_every_listed_file_is_found(bundle: Path) -> None:
    for name in read_manifest(bundle).files:
        path, whole = bundle / name, (bundle / name).read_bytes()
        for damaged in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[: len(whole) // 2], whole + b"\0", None):
            path.unlink()
            if damaged is not None:
                path.write_bytes(damaged)
            with pytest.raises(BadBundleError, match=rf"{re.escape(name)} is (corrupt|truncated|too long|missing)"):
                open_bundle(bundle)
        path.write_bytes(whole)
    open_bundle(bundle)


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
        (lambda m: m.update(format=True), "format True, this version reads 1"),
        (lambda m: m.update(format=1.0), "format 1.0, this version reads 1"),
        (lambda m: m.update(built_by=3), "built_by = 3: expected an object"),
        (lambda m: m["graphs"]["vae"].update(report=[1]), "report = .*expected an object"),
        (lambda m: m["graphs"].clear(), "graphs lacks vision"),
        (lambda m: m["graphs"].pop("vae"), "graphs lacks vae"),
        (lambda m: m["profile"].update(name=["x"]), "incomplete"),
        (lambda m: m.pop("format"), "lacks 'format'"),
        (lambda m: m.pop("graphs"), "incomplete"),
        (lambda m: m.update(surprise=1), "unknown keys"),
        (lambda m: m.update(runtime="coreml"), "runtime = 'coreml'"),
        (lambda m: m["files"].pop("vae.onnx"), "needs vae.onnx, which has no hash"),
        (lambda m: m["files"]["vae.onnx"].update(sha256="0"), "not a sha256"),
        (lambda m: m["files"]["vae.onnx"].update(bytes="many"), "not a size"),
        (lambda m: m["graphs"]["vae"].update(stage="upscaler"), "stage 'upscaler'"),
        (lambda m: m["model"].update(mystery=1), "mystery"),
        (lambda m: m.update(files=[]), "incomplete"),
        (lambda m: m.update(dtype="float8"), "dtype = 'float8'"),
        (lambda m: m.update(targets="sm_89"), "targets = 'sm_89'"),
        (lambda m: m.update(runtime_version=1), "runtime_version = 1"),
        (lambda m: m["files"]["vae.onnx"].update(bytes=True), "not a size"),
        (lambda m: m["files"]["vae.onnx"].update(bytes=-1), "not a size"),
        (lambda m: m["graphs"]["vae"].update(data="vae.data"), "data = 'vae.data'"),
        (lambda m: m["graphs"]["vae"].update(dtype=7), "dtype = 7"),
        (lambda m: m["graphs"].update(extra=m["graphs"]["vae"]), "graph 'extra' of stage vae is none"),
        (lambda m: m["graphs"].update(vae=m["graphs"]["vision"]), "graph 'vae' of stage vision is none"),
        (lambda m: m["profile"]["ranges"].update(steps=[1, 2]), "list of 3 items"),
        (lambda m: m["profile"]["ranges"].update(steps=[3, 2, 1]), "incomplete"),
        (lambda m: m["profile"]["ranges"].update(steps=[1, 2, "x"]), "whole number"),
        (lambda m: m["model"]["decoder"].update(time_frequencies=10**9), "time_frequencies = 1000000000"),
        (lambda m: m["model"]["language"]["stack"].update(num_layers=10**9), "num_layers = 1000000000"),
        (lambda m: m["model"]["vae"].update(scaling_factor=0), "scaling_factor = 0"),
        (lambda m: m["model"]["image"].update(image_std=[0, 1, 1]), "image_std"),
        (lambda m: m["model"]["generation"].update(repetition_penalty=0), "repetition_penalty = 0"),
        (lambda m: m["model"].update(edit_features="all"), "edit_features = 'all'"),
        (lambda m: m["model"]["generation"].update(eos_token_ids="x"), "eos_token_ids = 'x'"),
        (lambda m: m["model"]["decoder"]["stack"].update(num_layers=4), "shape"),
        (lambda m: m["files"].pop("mllm/tokenizer.json"), "not listed"),
        (lambda m: [m["files"].pop(f"mllm/{n}.json") for n in ("tokenizer", "vocab")], "lacks mllm/tokenizer.json"),
        (lambda m: [m["files"].pop(f"mllm/{n}.json") for n in ("chat_template", "tokenizer_config")], "chat template"),
    ],
)
def test_manifests_that_lie(bundle: Path, change: Edit, message: str) -> None:
    edit(bundle, change)
    with pytest.raises(BadBundleError, match=message):
        mindomni_rt.load(bundle)


def test_an_edited_manifest_is_refused(bundle: Path) -> None:
    text = (bundle / MANIFEST).read_text()
    for changed in (text.replace("0.13025", "0.13026"), json.dumps({**json.loads(text), "seal": "0" * 64})):
        assert changed != text
        (bundle / MANIFEST).write_text(changed)
        with pytest.raises(BadBundleError, match="edited or damaged: its own hash"):
            mindomni_rt.load(bundle)
    (bundle / MANIFEST).write_text(json.dumps(json.loads(text)))  # other spaces, the same data
    open_bundle(bundle)
    (bundle / "mllm" / "tokenizer_config.json").write_text((bundle / "mllm/tokenizer_config.json").read_text() + " ")
    with pytest.raises(BadBundleError, match="too long"):
        open_bundle(bundle)
    reseal(bundle)
    open_bundle(bundle)


@pytest.mark.parametrize(
    "name", ["mllm/chat_template.jinja", "mllm/generation_config2.json", "extra.onnx", "sub/x.json"]
)
def test_files_that_are_not_listed_are_refused(bundle: Path, name: str) -> None:
    (bundle / name).parent.mkdir(exist_ok=True)
    (bundle / name).write_text("{{ 'another template' }}")
    with pytest.raises(BadBundleError, match=f"{name} is not listed"):
        mindomni_rt.load(bundle)


def test_what_hubs_and_desktops_add_is_no_matter(bundle: Path) -> None:
    for name in ("README.md", ".gitattributes", ".cache/huggingface/x.lock", ".DS_Store"):
        (bundle / name).parent.mkdir(parents=True, exist_ok=True)
        (bundle / name).write_text("x")
    open_bundle(bundle)
    (bundle / "mllm" / "README.md").write_text("x")
    with pytest.raises(BadBundleError, match="not listed"):
        open_bundle(bundle)


def test_a_linked_folder_is_refused(bundle: Path, tmp_path: Path) -> None:
    shutil.move(bundle / "mllm", tmp_path / "elsewhere")
    (bundle / "mllm").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BadBundleError, match="mllm"):
        mindomni_rt.load(bundle)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("name", [MANIFEST, "vae.data", "mllm/tokenizer.json"])
def test_pipes_and_folders_are_refused_before_they_are_read(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    os.mkfifo(bundle / name)
    with pytest.raises(BadBundleError, match="regular file"):
        mindomni_rt.load(bundle)
    (bundle / name).unlink()
    (bundle / name).mkdir()
    with pytest.raises(BadBundleError, match=r"is a folder|is missing|no manifest|cannot be read"):
        mindomni_rt.load(bundle)


def in_hub_cache(bundle: Path, root: Path) -> Path:
    """The bundle as huggingface_hub keeps it: links into a folder of blobs."""
    snapshot = root / "models--me--bundle" / "snapshots" / ("a" * 40)
    (root / "models--me--bundle" / "blobs").mkdir(parents=True)
    for file in [p for p in bundle.rglob("*") if p.is_file()]:
        link = snapshot / file.relative_to(bundle)
        blob = root / "models--me--bundle" / "blobs" / sha256(file)
        shutil.copyfile(file, blob)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def test_the_hubs_cache_loads(bundle: Path, tmp_path: Path) -> None:
    snapshot = in_hub_cache(bundle, tmp_path / "hub")
    expected = mindomni_rt.load(bundle).understand("hello", max_new_tokens=4)
    assert mindomni_rt.load(snapshot).understand("hello", max_new_tokens=4).token_ids == expected.token_ids
    (snapshot / "vae.onnx").unlink()
    (snapshot / "vae.onnx").symlink_to(bundle / "vae.onnx")
    with pytest.raises(BadBundleError, match="leads out of the bundle"):
        mindomni_rt.load(snapshot)


def change_graph(bundle: Path, name: str, change: Callable[[Any], object]) -> None:
    """Edits an ONNX file and hashes everything again."""
    import onnx

    model = onnx.load(bundle / name, load_external_data=False)
    change(model)
    onnx.save(model, bundle / name)
    reseal(bundle)


def external(model: Any) -> Any:
    return next(t for t in model.graph.initializer if t.external_data)


def location(model: Any, value: str) -> None:
    next(e for e in external(model).external_data if e.key == "location").value = value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: location(m, "../secret.data"), r"reads the file '\.\./secret\.data'"),
        (lambda m: location(m, "/etc/passwd"), "reads the file '/etc/passwd'"),
        (lambda m: location(m, "language.data"), "reads the file 'language.data'"),
        (lambda m: external(m).ClearField("external_data"), "data file without name"),
        (lambda m: m.graph.output.pop(), "output 'pixels', which the contract of graph vae promises, is missing"),
        (lambda m: setattr(m.graph.output[0], "name", "picture"), "output 'picture' is not in the contract"),
        (lambda m: setattr(m.graph.input[0], "name", "noise"), "input 'noise' is not in the contract"),
        (lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", 7), "'latents' is int64; expected float32"),
        (lambda m: m.graph.input[0].type.tensor_type.shape.dim.pop(), "has 3 axes; expected 4"),
        (lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[1], "dim_value", 5), "has the shape"),
        (lambda m: m.ClearField("graph"), "0 graphs in it"),
    ],
)
def test_graphs_that_break_their_contract(bundle: Path, change: Callable[[Any], object], message: str) -> None:
    change_graph(bundle, "vae.onnx", change)
    with pytest.raises(BadBundleError, match=message):
        mindomni_rt.load(bundle)


@pytest.mark.parametrize("place", ["../secret.data", "{folder}/secret.data"])
def test_onnxruntime_itself_reads_no_weights_outside(bundle: Path, place: str) -> None:
    """Behind our own check."""
    import onnxruntime

    shutil.copy(bundle / "vae.data", bundle.parent / "secret.data")
    change_graph(bundle, "vae.onnx", lambda m: location(m, place.format(folder=bundle.parent)))
    with pytest.raises(Exception, match=r"(?i)external data|outside|escapes|absolute"):
        onnxruntime.InferenceSession(str(bundle / "vae.onnx"), providers=["CPUExecutionProvider"])


def test_weights_of_inner_graphs_are_seen_too(bundle: Path) -> None:
    """A data file that only a subgraph or a node's attribute names."""
    import onnx

    def attach(model: Any) -> None:
        tensor = onnx.TensorProto()
        tensor.CopyFrom(external(model))
        location(model, next(e for e in external(model).external_data if e.key == "location").value)
        next(e for e in tensor.external_data if e.key == "location").value = "hidden.data"
        graph = onnx.helper.make_graph([], "inner", [], [], [tensor])
        model.graph.node[0].attribute.append(onnx.helper.make_attribute("body", graph))

    change_graph(bundle, "vae.onnx", attach)
    with pytest.raises(BadBundleError, match=r"reads the file 'hidden\.data'"):
        mindomni_rt.load(bundle)


def test_a_loop_is_refused(bundle: Path) -> None:
    """It need not end, and no graph of ours has one."""
    import onnx

    def loop(model: Any) -> None:
        condition = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.BOOL, []) for name in ("c", "again")]
        count = onnx.helper.make_tensor_value_info("i", onnx.TensorProto.INT64, [])
        same = onnx.helper.make_node("Identity", ["c"], ["again"])
        body = onnx.helper.make_graph([same], "body", [count, condition[0]], [condition[1]])
        model.graph.node.append(onnx.helper.make_node("Loop", ["", ""], [], body=body))

    change_graph(bundle, "vae.onnx", loop)
    with pytest.raises(BadBundleError, match=r"vae\.onnx has a graph inside its graph"):
        mindomni_rt.load(bundle)


def test_a_graph_that_fails_while_it_runs(bundle: Path) -> None:
    """Its inputs and outputs keep the contract; what is between them does not fit together."""

    def break_it(model: Any) -> None:
        pads = [a for n in model.graph.node if n.op_type == "Conv" for a in n.attribute if a.name == "pads"]
        next(a for a in pads if any(a.ints)).ints[:] = [0, 0, 0, 0]

    change_graph(bundle, "vae.onnx", break_it)
    with pytest.raises(BadBundleError, match=r"graph vae failed in onnxruntime|onnxruntime .* refuses it"):
        mindomni_rt.load(bundle).generate("x", height=32, width=32, num_inference_steps=1, think=False)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_bytes_break_the_reader_of_graphs(bundle: Path, data: st.DataObject) -> None:
    whole = (bundle / "euler.onnx" if (bundle / "euler.onnx").exists() else bundle / "choose.onnx").read_bytes()
    changed = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 8))):
        changed[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path = bundle.with_name("mutant.onnx")
    path.write_bytes(changed[: data.draw(st.integers(1, len(whole)))])
    with contextlib.suppress(BadBundleError):
        read_onnx(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00\xff", "[" * 100_000, '{"format": ' + "1" * 5000 + "}",
                                  '{"format": NaN}'])  # fmt: skip
def test_manifests_that_are_none(bundle: Path, text: str) -> None:
    (bundle / MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(BadBundleError):
        mindomni_rt.load(bundle)


def test_a_link_to_itself(bundle: Path) -> None:
    (bundle / "vae.onnx").unlink()
    (bundle / "vae.onnx").symlink_to("vae.onnx")
    with pytest.raises(BadBundleError, match=r"vae\.onnx"):
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
    command = [sys.executable, "-m", "export", "build", str(PARITY), "--target", "cpu", "--no-cache", "--out", str(out)]
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


def test_control_c_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    command = [sys.executable, "-m", "export", "build", str(PARITY), "--target", "cpu", "--no-cache", "--out", str(out)]
    command.append("--quiet")  # no line for each graph
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
