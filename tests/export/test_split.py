"""A divided graph: its parts compute what the whole does, and a bundle is refused whose parts do not fit together."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from mindomni_rt.bundle.manifest import open_bundle
from mindomni_rt.bundle.reseal import reseal
from mindomni_rt.errors import BadBundleError
from mindomni_rt.export import parts as module
from mindomni_rt.export.build import BuildRequest, build
from mindomni_rt.export.split import split
from mindomni_rt.export.targets import choose, parse_target
from mindomni_rt.export.weights import BuildError

SIZES = {"sequence": 4, "capacity": 9, "scores": 2, "images": 1}


def layers_of(bundle: Path) -> int:
    return int(open_bundle(bundle).manifest.model.language.stack.num_layers)


@pytest.fixture
def graph(bundles: Callable[[str], Path], tmp_path: Path) -> tuple[Path, int]:
    """A language graph of 4 bits, and how many layers it has."""
    source = bundles("int4")
    for path in source.glob("language.*"):
        shutil.copyfile(path, tmp_path / path.name)
    return tmp_path / "language.onnx", layers_of(source)


def run(files: list[Path], values: dict[str, Any]) -> dict[str, Any]:
    """Outputs of files that run one after another."""
    values = dict(values)
    for file in files:
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        found = session.run(None, {i.name: values[i.name] for i in session.get_inputs()})
        values |= {o.name: value for o, value in zip(session.get_outputs(), found, strict=True)}
    return values


def inputs_of(file: Path) -> dict[str, Any]:
    draw, found = np.random.default_rng(0), {}
    for i in onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"]).get_inputs():
        shape = [SIZES.get(axis, axis) for axis in i.shape]
        integers = {"token_ids": [[5, 3, 7, 1]], "source": [0, 1, 2, 3], "scored": [1, 3], "start": [2]}
        found[i.name] = (
            np.array(integers[i.name]) if i.name in integers else draw.standard_normal(shape).astype(np.float32)
        )
    return found


@pytest.mark.parametrize("count", [1, 2, 1000])
def test_parts_compute_what_the_whole_does(graph: tuple[Path, int], count: int) -> None:
    file, layers = graph
    parts = split(file, layers, count, like="hidden")
    assert len(parts) == min(count, layers)
    values = inputs_of(file)
    whole, found = run([file], values), run(parts, values)
    assert whole.keys() <= found.keys()
    for name, value in whole.items():
        assert np.array_equal(value, found[name]), name


def test_each_weight_is_in_one_part(graph: tuple[Path, int]) -> None:
    file, layers = graph

    def weights(path: Path) -> list[str]:
        return [t.name for t in onnx.load(path, load_external_data=False).graph.initializer if t.external_data]

    held = [name for part in split(file, layers, layers, like="hidden") for name in weights(part)]
    assert sorted(held) == sorted(weights(file))


def test_two_tensors_between_layers_are_refused(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Mul", ["x", "a.layers.0.w"], ["y"]),
        helper.make_node("Add", ["x", "a.layers.0.w"], ["z"]),
        helper.make_node("Mul", ["y", "a.layers.1.w"], ["u"]),
        helper.make_node("Add", ["u", "z"], ["hidden"]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "hidden")]
    weights = [helper.make_tensor(f"a.layers.{n}.w", TensorProto.FLOAT, [1], [2.0]) for n in range(2)]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:], weights)), tmp_path / "g.onnx")
    with pytest.raises(BuildError, match="2 tensors pass between layers 0 and 1"):
        split(tmp_path / "g.onnx", 2, 2, like="hidden")


def test_a_large_language_model_is_built_in_parts(
    bundles: Callable[[str], Path], tmp_path: Path, export_cache: Path, monkeypatch: pytest.MonkeyPatch, parity: Path
) -> None:
    monkeypatch.setattr(module, "_LARGE", 0)
    target = parse_target("cpu")
    request = BuildRequest(
        checkpoint=parity, out=tmp_path / "b", target=target, choice=choose(target, "int4"), cache=export_cache
    )
    build(request)
    found = open_bundle(tmp_path / "b").manifest.graphs["language"]
    assert found.parts == tuple(f"language.{n}.onnx" for n in range(layers_of(tmp_path / "b")))
    assert {path.name for path in (tmp_path / "b").glob("language.*")} == set(found.files)
    small = bundles("int4")
    assert (small / "language.data").read_bytes() == (tmp_path / "b" / "language.data").read_bytes()
    assert open_bundle(small).manifest.graphs["language"].parts == ()


def swapped(parts: list[str]) -> None:
    parts.reverse()


def twice(parts: list[str]) -> None:
    parts.append(parts[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swapped, "language.2.onnx: no earlier part gives its input 'add_257'"),
        (twice, r"language.0.onnx: output '.*' is given twice"),
        (lambda parts: parts.pop(), "no part gives output 'hidden'"),
        (lambda parts: parts.append("language.9.onnx"), "needs language.9.onnx, which has no hash"),
        (
            lambda parts: parts.append("vae.onnx"),
            "vae.onnx reads the file 'vae.data', which manifest.json does not give",
        ),
        (lambda parts: parts.append(3), "parts"),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    divided: Path, tmp_path: Path, change: Callable[[Any], object], message: str
) -> None:
    shutil.copytree(divided, tmp_path / "b")
    path = tmp_path / "b" / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    change(manifest["graphs"]["language"]["parts"])
    path.write_text(json.dumps(manifest), encoding="utf-8")
    reseal(tmp_path / "b")
    with pytest.raises(BadBundleError, match=message):
        open_bundle(tmp_path / "b")
