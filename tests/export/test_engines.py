"""Engines built with no GPU, by TensorRT-RTX. That they run is for `export verify` on a card; here: they build."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import PARITY
from onnx import TensorProto, helper, numpy_helper

from mindomni_rt.bundle.contracts import decoding, graph_specs, profile
from mindomni_rt.bundle.manifest import open_bundle, read_manifest
from mindomni_rt.errors import UnsupportedDeviceError
from mindomni_rt.export import engines
from mindomni_rt.export.build import BuildRequest, build
from mindomni_rt.export.engines import (
    EngineBuildError,
    EngineReport,
    MappedWeights,
    build_engine,
    external_files,
    fused_attention,
)
from mindomni_rt.export.targets import ARCHITECTURES, PRECISIONS, choose, parse_target

trt = pytest.importorskip("tensorrt_rtx", reason="engines need TensorRT for RTX (extra: export)")
RTX = [sm for sm, a in ARCHITECTURES.items() if a.runtime == "tensorrt_rtx"]


def engine(bundle: Path, graph: str, out: Path, sms: tuple[str, ...], **more: object) -> EngineReport:
    config = read_manifest(bundle).model
    options = {"dtype": "float16", "sms": sms, **more}
    return build_engine(bundle / f"{graph}.onnx", out, graph_specs(config)[graph], profile("512", config), **options)  # type: ignore[arg-type]


def test_one_plan_for_several_architectures(bundles: Callable[[str], Path], tmp_path: Path) -> None:
    steps: list[tuple[str, int, int]] = []

    def progress(phase: str, done: int, of: int) -> bool:
        steps.append((phase, done, of))
        return True

    out = tmp_path / "language.plan"
    report = engine(bundles("fp16"), "language", out, ("sm_75", "sm_89", "sm_120"), progress=progress)
    assert report.bytes == out.stat().st_size > 100_000 and report.attention == 3
    assert steps and all(0 < done <= of for _, done, of in steps)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["language.plan"]


def test_a_second_build_comes_from_the_cache(
    bundles: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = engine(bundles("fp16"), "update", tmp_path / "a.plan", ("sm_89",), cache=tmp_path / "cache")
    again = engine(bundles("fp16"), "update", tmp_path / "b.plan", ("sm_89",), cache=tmp_path / "cache")
    other = engine(bundles("fp16"), "update", tmp_path / "c.plan", ("sm_86",), cache=tmp_path / "cache")
    assert (first.cached, again.cached, other.cached) == (False, True, False)
    assert (tmp_path / "a.plan").read_bytes() == (tmp_path / "b.plan").read_bytes()
    note = next(p for p in (tmp_path / "cache").glob("*.json"))
    assert json.loads(note.read_text())["report"]["bytes"] > 0
    for kept in (tmp_path / "cache").glob("*.plan"):
        kept.write_bytes(bytes(kept.stat().st_size))
    monkeypatch.setattr(engines, "_build", lambda _trt, _onnx, temporary, *_: temporary.write_bytes(b"built again"))
    assert not engine(bundles("fp16"), "update", tmp_path / "d.plan", ("sm_89",), cache=tmp_path / "cache").cached
    assert (tmp_path / "d.plan").read_bytes() == b"built again"


def test_a_progress_monitor_can_stop_a_build(bundles: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(EngineBuildError):
        engine(bundles("fp16"), "vae", tmp_path / "x.plan", ("sm_89",), progress=lambda *_: False)
    assert not list(tmp_path.iterdir())


def test_an_attention_without_a_fused_kernel_is_an_error_where_one_is_expected(
    bundles: Callable[[str], Path], tmp_path: Path
) -> None:
    """float32 attention has no kernel. Told that the graph is float16, which has one, the build must fail."""
    spec = graph_specs(read_manifest(bundles("fp32")).model)["language"]
    assert fused_attention("float16", spec.head_dim)
    with pytest.raises(EngineBuildError, match="no fused attention kernel"):
        engine(bundles("fp32"), "language", tmp_path / "a.plan", ("sm_89",), dtype="float16")
    report = engine(bundles("fp32"), "language", tmp_path / "b.plan", ("sm_89",), dtype="float32")
    assert not report.fused and report.attention == 3


def test_what_is_fused() -> None:
    """By trial on TensorRT-RTX 1.7."""
    sixteen = [fused_attention("bfloat16", d) for d in (64, 80, 96, 128, 256)]
    assert all(sixteen) and not any(fused_attention("float16", d) for d in (8, 12, 264, 512))
    assert not fused_attention("float32", 128)


def test_an_architecture_that_the_runtime_has_not(bundles: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedDeviceError, match="sm_90"):
        engine(bundles("fp16"), "update", tmp_path / "x.plan", ("sm_90",))


def test_a_damaged_graph(bundles: Callable[[str], Path], tmp_path: Path) -> None:
    """The weights' file is missing: TensorRT's refusal comes as our error."""
    source = bundles("fp16") / "connector.onnx"
    (tmp_path / "connector.onnx").write_bytes(source.read_bytes())
    assert external_files(source) == ["connector.data"]
    config = read_manifest(bundles("fp16")).model
    with pytest.raises(EngineBuildError, match="connector"):
        build_engine(
            tmp_path / "connector.onnx",
            tmp_path / "x.plan",
            graph_specs(config)["connector"],
            profile("512", config),
            dtype="float16",
            sms=("sm_89",),
        )


@pytest.mark.compile
@pytest.mark.timeout(900)
@pytest.mark.parametrize("sm", RTX)
@pytest.mark.parametrize("precision", [None, *(p for p in PRECISIONS if p != "mixed")])
def test_every_architecture_in_every_precision(sm: str, precision: str | None, tmp_path: Path) -> None:
    """Whole bundles of the parity checkpoint: 22 minutes on two cores in all."""
    target = parse_target(sm)
    if precision is not None and precision not in ARCHITECTURES[sm].precisions:
        with pytest.raises(UnsupportedDeviceError, match=f"precision {precision} on {sm}"):
            choose(target, precision)
        return
    request = BuildRequest(
        checkpoint=PARITY,
        out=tmp_path / "bundle",
        target=target,
        choice=choose(target, precision),
        profile="512",
        calibration_size=64,
    )
    manifest = build(request)
    assert manifest.targets == (sm,) and manifest.runtime_version == trt.__version__
    assert open_bundle(tmp_path / "bundle").manifest == read_manifest(tmp_path / "bundle")
    assert all(g.file.endswith(".plan") and g.report["build_seconds"] > 0 for g in manifest.graphs.values())


def test_the_language_engine_has_a_profile_for_one_token(bundles: Callable[[str], Path]) -> None:
    """TensorRT-RTX's parser and builder stand for TensorRT's, whose API is the same; nothing is built."""
    bundle = bundles("fp16")
    spec, sizes = graph_specs(read_manifest(bundle).model)["language"], profile("512", read_manifest(bundle).model)
    one = decoding(spec, sizes)
    assert one is not None and decoding(graph_specs(read_manifest(bundle).model)["vae"], sizes) is None
    builder = trt.Builder(trt.Logger())
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser, path = trt.OnnxParser(network, trt.Logger()), bundle / "language.onnx"
    assert parser.parse(engines._with_fixed_axes(path, spec, sizes, inline=True), str(path))
    config = builder.create_builder_config()
    both = [engines._shapes(builder, network, spec, sizes), engines._shapes(builder, network, spec, one, sizes)]
    assert [config.add_optimization_profile(shapes) for shapes in both] == [0, 1]
    assert [tuple(shape) for shape in both[1].get_shape("token_ids")] == [(1, 1)] * 3
    assert [tuple(shape) for shape in both[1].get_shape("scored")] == [(1,)] * 3
    images = [tuple(shape) for shape in both[1].get_shape("image_embeds")]
    assert images == [tuple(shape) for shape in both[0].get_shape("image_embeds")]


def test_mapped_weights_give_the_same_engine(tmp_path: Path) -> None:
    """Weights handed to the parser where they are mapped, and read by the parser itself."""
    weight = np.random.default_rng(0).standard_normal((256, 512)).astype(np.float16)
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT16, [4, size]) for name, size in (("x", 256), ("y", 512))
    ]
    node, stored = helper.make_node("MatMul", ["x", "w"], ["y"]), numpy_helper.from_array(weight, "w")
    graph = helper.make_graph([node], "g", ends[:1], ends[1:], [stored])
    path = tmp_path / "a.onnx"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, str(path), save_as_external_data=True, location="a.data", size_threshold=64)
    text = onnx.load(str(path), load_external_data=False).SerializeToString()
    log, made = trt.Logger(trt.Logger.ERROR), []
    for mapped in (False, True):
        builder = trt.Builder(log)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser, weights = trt.OnnxParser(network, log), MappedWeights(tmp_path)
        assert weights.parse(parser, text, str(path)) if mapped else parser.parse(text, str(path))
        config = builder.create_builder_config()
        engines._target(trt, config, ["sm_89"])
        made.append(bytes(builder.build_serialized_network(network, config)))
    assert made[0] == made[1] and len(made[0]) > weight.nbytes
