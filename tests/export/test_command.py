"""The command line, verification of a wrong bundle, contracts against the files that were written."""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from conftest import PARITY

from mindomni_rt.bundle.contracts import OPSET, PROFILES, graph_specs, profile, resolve
from mindomni_rt.bundle.manifest import MANIFEST, hash_files, read_manifest
from mindomni_rt.bundle.seal import sealed_json
from mindomni_rt.demo import DEMO_MODELS
from mindomni_rt.errors import BadRequestError
from mindomni_rt.export import traces
from mindomni_rt.export.cli import main
from mindomni_rt.export.request import BuildRequest
from mindomni_rt.export.weights import BuildError
from mindomni_rt.model.tiny import write_random_checkpoint

SMALL_BUNDLE = DEMO_MODELS[0][0]


def one_error(text: str) -> bool:
    """Whether standard error is the line of a mistake, after the line of what was being loaded where a build began."""
    lines = text.splitlines()
    before = ("loading torch and ", "graph ")
    return lines[-1].startswith("error: ") and all(line.startswith(before) for line in lines[:-1])


def test_verify_passes_and_fails(
    bundles: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(bundles("fp32")), "--against", str(PARITY)]) == 0
    out = capsys.readouterr().out
    assert out.count("pass") == 10 and "FAIL" not in out
    assert main(["verify", str(bundles("fp32"))]) == 0
    out = capsys.readouterr().out
    assert "nothing was compared" in out and "pass" not in out and out.count("  ran") == 10
    # A bundle whose denoiser is not this checkpoint's: right hashes, wrong numbers.
    wrong = Path(shutil.copytree(bundles("fp32"), tmp_path / "wrong"))
    data = bytearray((wrong / "decoder.data").read_bytes())
    data[: len(data) // 2] = bytes(len(data) // 2)
    (wrong / "decoder.data").write_bytes(data)
    manifest = json.loads((wrong / MANIFEST).read_text())
    manifest["files"] = {k: v.__dict__ for k, v in hash_files(wrong).items()}
    (wrong / MANIFEST).write_text(sealed_json(manifest))
    capsys.readouterr()
    assert main(["verify", str(wrong), "--against", str(PARITY)]) == 1
    out = capsys.readouterr().out
    assert "FAIL" in out and "language   hidden       fp32" in out


def test_a_users_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mistakes = (
        ["build", str(tmp_path / "absent"), "--target", "cpu", "--out", str(tmp_path / "out")],
        ["build", str(PARITY), "--target", "sm_75", "--precision", "bf16", "--out", str(tmp_path / "out")],
        ["build", str(PARITY), "--target", "toaster", "--out", str(tmp_path / "out")],
        ["inspect", str(tmp_path)],
        ["verify", str(tmp_path / "absent")],
        ["verify", str(PARITY)],
        ["build", str(SMALL_BUNDLE), "--target", "cpu", "--out", str(tmp_path / "out")],
        ["verify", str(SMALL_BUNDLE), "--against", str(SMALL_BUNDLE)],
        ["plan", "--device", "rtx4060", "--checkpoint", str(SMALL_BUNDLE)],
        ["build", str(PARITY), "--target", "cpu", "--out", "."],
        ["build", str(PARITY), "--target", "cpu", "--out", "/"],
        ["build", str(PARITY), "--target", "cpu", "--out", str(tmp_path / ("x" * 300))],
        ["build", str(PARITY), "--target", "cpu", "--out", "/proc/nothing/bundle"],
        ["build", str(PARITY), "--target", "cpu", "--out", str(PARITY / "connector.safetensors" / "bundle")],
        ["plan", "--device", "toaster"],
        ["plan", "--device", "rtx4060", "--memory-budget", "1GB"],
        ["rehearse", "decoder", "--target", "cpu", "--layers", "99"],
    )
    for arguments in mistakes:
        assert main(arguments) == 2, arguments
        error = capsys.readouterr().err
        assert one_error(error), error
        assert "is a bundle" in error or str(SMALL_BUNDLE) not in arguments
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [[], ["built"], ["build"], ["verify"], ["build", "x", "--target", "cpu", "--out", "y", "--precision", "z"]],
)
def test_parser_mistakes_are_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error


def test_verify_against_another_model(
    bundles: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_random_checkpoint(tmp_path / "other")
    assert main(["verify", str(bundles("fp32")), "--against", str(tmp_path / "other")]) == 2
    error = capsys.readouterr().err
    assert "another model than the bundle's" in error and error.count("\n") == 1


def test_a_refused_build_leaves_the_bundles_log_alone(
    bundles: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copytree(bundles("fp32"), tmp_path / "b"))
    log = tmp_path / "b.build.log"
    log.write_text("of the good build")
    arguments = ["build", str(PARITY), "--target", "cpu", "--out", str(out)]
    assert main(arguments) == 2
    assert capsys.readouterr().err.count("exists") == 1
    damaged = Path(shutil.copytree(PARITY, tmp_path / "damaged"))
    (damaged / "connector.safetensors").write_bytes(b"")
    assert main(["build", str(damaged), *arguments[2:], "--overwrite"]) == 2
    assert capsys.readouterr().err.count("connector.safetensors") == 1
    shutil.rmtree(damaged)
    assert log.read_text() == "of the good build"
    assert "stopped" in (tmp_path / "b.build-failed.log").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "b.build-failed.log", "b.build.log"]


def test_a_full_disk_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mindomni_rt.export.store import WeightStore

    def full(self: WeightStore, data: bytes) -> tuple[int, int]:
        raise OSError(errno.ENOSPC, "No space left on device")  # as `write` says it: without a name

    monkeypatch.setattr(WeightStore, "add", full)
    assert main(["build", str(PARITY), "--target", "cpu", "--out", str(tmp_path / "b")]) == 2
    error = capsys.readouterr().err
    assert f"bundle {tmp_path / 'b'} could not be written: No space left on device" in error and one_error(error)
    assert [p.name for p in tmp_path.iterdir()] == ["b.build.log"]


LOADING = f"loading torch and {PARITY} …"


@pytest.mark.parametrize(("option", "lines"), [([], [LOADING, "graph 1 of 1"]), (["--quiet"], []), (["-v"], [LOADING])])
def test_progress_is_said_once(
    option: list[str], lines: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def build(request: BuildRequest) -> None:
        if request.say is not None:
            request.say("graph 1 of 1")
        raise BuildError("stopped here")

    monkeypatch.setattr("mindomni_rt.export.build.build", build)
    assert main(["build", str(PARITY), "--target", "cpu", "--out", str(tmp_path / "b"), *option]) == 2
    assert capsys.readouterr().err.splitlines() == [*lines, "error: stopped here"]


def test_inspect(bundles: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(bundles("fp32"))]) == 0
    out = capsys.readouterr().out
    assert "all hashes agree" in out and "denoiser.onnx" in out
    assert "by stage, MB: vision" in out and "language weights, MB by type" in out and "float32" in out
    assert main(["inspect", "--json", str(bundles("fp32"))]) == 0
    assert json.loads(capsys.readouterr().out)["runtime"] == "onnx"


def test_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--device", "rtx4090"]) == 0
    assert "all figures are predictions" in capsys.readouterr().out


def test_files_follow_their_contracts(bundles: Callable[[str], Path]) -> None:
    bundle = bundles("fp32")
    manifest = read_manifest(bundle)
    specs = graph_specs(manifest.model)
    assert set(manifest.graphs) == set(specs)
    for name, spec in specs.items():
        model = onnx.load(str(bundle / f"{name}.onnx"), load_external_data=False)
        onnx.checker.check_model(str(bundle / f"{name}.onnx"))
        assert {o.version for o in model.opset_import if o.domain == ""} == {OPSET}
        for values, tensors in ((model.graph.input, spec.inputs), (model.graph.output, spec.outputs)):
            assert [v.name for v in values] == [t.name for t in tensors]
            for value, tensor in zip(values, tensors, strict=True):
                found = [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
                assert found == [a if isinstance(a, int) else a.replace("*", "x") for a in tensor.axes]


def test_attention_stays_one_node(bundles: Callable[[str], Path]) -> None:
    """One Attention a layer, with as many key heads as the model has: grouped queries are not repeated."""
    bundle = bundles("fp32")
    config = read_manifest(bundle).model
    layers = {
        "language": config.language.stack.num_layers,
        "denoiser": config.decoder.stack.num_layers,
        "prefix": config.decoder.stack.num_layers - 1,  # the last layer's output is never read
        "vision": config.vision.num_layers,
    }
    for name, count in layers.items():
        nodes = onnx.load(str(bundle / f"{name}.onnx"), load_external_data=False).graph.node
        assert sum(n.op_type == "Attention" for n in nodes) == count
        assert not any(n.op_type in ("Softmax", "Tile") for n in nodes)
    scatters = [
        n
        for n in onnx.load(str(bundle / "language.onnx"), load_external_data=False).graph.node
        if n.op_type == "TensorScatter"
    ]
    assert len(scatters) == 2 * layers["language"]


@pytest.mark.parametrize("name", PROFILES)
def test_profiles(name: str, bundles: Callable[[str], Path]) -> None:
    config = read_manifest(bundles("fp32")).model
    sizes = profile(name, config)
    for spec in graph_specs(config).values():
        for tensor in spec.inputs + spec.outputs:
            least, tuned, most = sizes.shapes(tensor)
            assert all(a <= b <= c for a, b, c in zip(least, tuned, most, strict=True))
    high = sizes.ranges["image_tokens"][2]
    sizes.check("denoiser", {"image_tokens": high})
    with pytest.raises(BadRequestError, match="serves"):
        sizes.check("denoiser", {"image_tokens": high + 1})
    assert resolve("4*merged", {"merged": 3}) == 12


def test_unknown_profile() -> None:
    from mindomni_rt.checkpoint.config import published

    with pytest.raises(BadRequestError, match="profile '2048'"):
        profile("2048", published())


def test_an_edit_with_vae_features_equals_the_reference(
    bundles: Callable[[str], Path], tmp_path: Path, export_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graph `features` and the VAE's encoder are used. How a checkpoint treats requests changes no trace."""
    import numpy as np
    from PIL import Image

    import mindomni_rt
    from mindomni_rt.export.build import BuildRequest, build
    from mindomni_rt.export.targets import choose, parse_target

    bundles("fp32")
    model = shutil.copytree(PARITY, tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        file = model / "mllm" / name
        file.write_text(file.read_text().replace("<|quad_start|>", "<|latent_pad|>"))
    (model / "mindomni.json").write_text('{"edit_features": "vit+vae", "recommended": {}}')
    target = parse_target("cpu")
    choice = choose(target, "fp32")
    monkeypatch.setattr(traces, "trace", None)
    build(
        BuildRequest(
            checkpoint=tmp_path / "model", out=tmp_path / "b", target=target, choice=choice, cache=export_cache
        )
    )
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 72, 3), np.uint8))
    options = dict(
        image=image, edit_features="vit+vae", height=32, width=48, num_inference_steps=2, max_new_tokens=5, seed=1,
        output="numpy",
    )  # fmt: skip
    found, wanted = (
        mindomni_rt.load(path, device="cpu").generate("red", **options) for path in (tmp_path / "b", tmp_path / "model")
    )
    assert found.token_ids == wanted.token_ids
    assert np.abs(found.images - wanted.images).max() < 1 / 255


def test_a_budget_lets_stages_take_turns(bundles: Callable[[str], Path]) -> None:
    import numpy as np

    import mindomni_rt
    from mindomni_rt.backends.compiled.backend import CompiledBackend
    from mindomni_rt.errors import OutOfMemoryError

    options = dict(height=32, width=32, num_inference_steps=2, max_new_tokens=4, seed=1, output="numpy")
    whole = mindomni_rt.load(bundles("fp32")).generate("a cat", **options)
    with pytest.raises(OutOfMemoryError, match="alone needs"):
        mindomni_rt.load(bundles("fp32"), memory_budget="1MB")
    pipe = mindomni_rt.load(bundles("fp32"))
    assert isinstance(pipe.backend, CompiledBackend)
    pipe.backend._resident = frozenset({"vae"})
    assert np.array_equal(pipe.generate("a cat", **options).images, whole.images)
    assert pipe.backend._loaded == {"vae"}


@pytest.mark.timeout(900)
def test_our_attention_as_a_function_of_the_graph(
    bundles: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--attention triton: one node a layer, which onnxruntime runs by its body and TensorRT-RTX builds inlined."""
    import numpy as np

    import mindomni_rt
    from mindomni_rt.export.engines import build_engine, plugin_node

    out = tmp_path / "ours"
    assert main(["build", str(PARITY), "--target", "cpu", "--attention", "triton", "--out", str(out)]) == 0
    log = (tmp_path / "ours.build.log").read_text()
    assert "denoiser: trace" in log and "time: " in log and "export cache --clear" in log
    manifest = read_manifest(out)
    first, *lines = capsys.readouterr().err.splitlines()  # no terminal
    assert first == LOADING
    form = r"graph (\d+) of (\d+), (\w+): tr.*, [\d.]+ MB of weights written in [\d.]+ s(; about \d+ \w+ left of .*)?"
    found = [re.fullmatch(form, line) for line in lines]
    assert all(found), lines
    assert sorted(m[3] for m in found if m) == sorted(manifest.graphs)
    assert [bool(m[4]) for m in found if m] == [True] * (len(found) - 1) + [False]
    config = manifest.model
    nodes = onnx.load(str(out / "denoiser.onnx"), load_external_data=False).graph.node
    assert sum(n.domain == "mindomni" for n in nodes) == config.decoder.stack.num_layers
    stack = config.decoder.stack
    assert plugin_node(out / "denoiser.onnx") == {"heads": stack.num_heads, "head_dim": stack.head_dim}
    assert plugin_node(bundles("fp32") / "denoiser.onnx") is None
    options = dict(height=32, width=48, num_inference_steps=3, max_new_tokens=6, seed=1, output="numpy")
    ours, wanted = (mindomni_rt.load(b).generate("two cats", **options) for b in (out, bundles("fp32")))
    assert np.abs(ours.images - wanted.images).max() < 1 / 255
    pytest.importorskip("tensorrt_rtx", reason="engines need TensorRT for RTX")
    report = build_engine(
        out / "denoiser.onnx",
        tmp_path / "denoiser.plan",
        graph_specs(config)["denoiser"],
        profile("512", config),
        dtype="float32",
        sms=("sm_89",),
    )
    assert report.attention == stack.num_layers


def test_a_hub_id_is_a_checkpoint(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    hub, asked = pytest.importorskip("huggingface_hub"), []
    monkeypatch.setattr("mindomni_rt.checkpoint.hub._silence", lambda *_: None)
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **_: asked.append(name) or str(PARITY))
    assert main(["plan", "--device", "rtx4060", "--checkpoint", "some/model"]) == 0
    assert asked == ["some/model"] and capsys.readouterr().out
