"""The ComfyUI nodes against the types of its published API (`stub/`), run on the small model as ComfyUI runs them."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import sys
import tomllib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from workflow import FOLDER, Widgets, as_prompt, read_workflow

import mindomni_rt

pytest.importorskip("onnxruntime", reason="the small bundle needs the onnx extra")
RIDDLE = "draw (1 + 2) things of the colour of a lemon, shaped like a wheel"
CHANGE = "the same, but one more and in the colour of the sea"
SMALL = dict(height=96, width=96, num_inference_steps=20, guidance_scale=1.0, max_new_tokens=48)
PAINT = dict(steps=20, guidance=1.0, negative_prompt="", preview_every=5)
STUB = Path(__file__).parent / "stub"


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The folder, imported as ComfyUI imports one of `custom_nodes`: under its path, with a folder of models."""
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(STUB))
    paths = importlib.import_module("folder_paths")
    assert Path(paths.__file__).is_relative_to(STUB)
    paths.models_dir = str(tmp_path_factory.mktemp("models"))
    name = str(FOLDER)
    spec = importlib.util.spec_from_file_location(name, FOLDER / "__init__.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    patch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    yield module
    stubs = ("comfy", "comfy_api", "folder_paths", "server", name)
    for known in [m for m in sys.modules if m.split(".")[0] in stubs]:
        del sys.modules[known]
    patch.undo()


@pytest.fixture(scope="module")
def nodes(pack: ModuleType) -> dict[str, Any]:
    extension = asyncio.run(pack.comfy_entrypoint())
    return {node.define_schema().node_id: node for node in asyncio.run(extension.get_node_list())}


@pytest.fixture
def comfy(pack: ModuleType) -> Iterator[SimpleNamespace]:
    """What the nodes report, and the stop button."""
    management, utils, server = (
        importlib.import_module(n) for n in ("comfy.model_management", "comfy.utils", "server")
    )
    kept = (utils.shown, utils.on_update, server.texts, server.on_text)
    for found in kept:
        found.clear()
    stopped = management.InterruptProcessingException
    yield SimpleNamespace(state=management.state, stopped=stopped, utils=utils, server=server)
    for found in kept:
        found.clear()
    management.state["interrupted"] = False


def run(node: Any, node_id: str = "9", **inputs: Any) -> tuple[Any, ...]:
    """A node's outputs, run as ComfyUI does: on a clone of its class that knows the node's id."""
    clone = type(node.__name__, (node,), {"hidden": SimpleNamespace(unique_id=node_id)})
    return clone.execute(**inputs).args


@pytest.fixture(scope="module")
def model(nodes: dict[str, Any]) -> mindomni_rt.Pipeline:
    return run(nodes["MindOmniLoad"], model="shapes-world-bundle", path_or_hub_id="", device="auto", precision="auto")[
        0
    ]


@pytest.fixture(scope="module")
def alone(model: mindomni_rt.Pipeline) -> mindomni_rt.GenerationResult:
    """What the package itself makes of the riddle."""
    return model.generate(RIDDLE, seed=7, output="numpy", **SMALL)


def test_ids_never_change(nodes: dict[str, Any]) -> None:
    assert list(nodes) == ["MindOmniLoad", "MindOmniThink", "MindOmniGenerate", "MindOmniEdit", "MindOmniUnderstand"]
    schemas = {name: node.define_schema() for name, node in nodes.items()}
    assert {name: [i.id for i in s.inputs] for name, s in schemas.items()} == {
        "MindOmniLoad": ["model", "path_or_hub_id", "device", "precision"],
        "MindOmniThink": ["mindomni", "prompt", "cascade", "max_new_tokens", "temperature", "seed", "image"],
        "MindOmniGenerate": ["mindomni", "prompt", "think", "width", "height", "steps", "guidance", "seed",
                             "negative_prompt", "preview_every", "batch_size", "thought"],
        "MindOmniEdit": ["mindomni", "image", "prompt", "think", "width", "height", "steps", "guidance", "seed",
                         "negative_prompt", "preview_every", "edit_features"],
        "MindOmniUnderstand": ["mindomni", "prompt", "max_new_tokens", "temperature", "seed", "image"],
    }  # fmt: skip
    assert {name: [o.io_type for o in s.outputs] for name, s in schemas.items()} == {
        "MindOmniLoad": ["MINDOMNI_MODEL"],
        "MindOmniThink": ["MINDOMNI_THOUGHT", "STRING", "STRING"],
        "MindOmniGenerate": ["IMAGE", "STRING", "STRING"],
        "MindOmniEdit": ["IMAGE", "STRING", "STRING"],
        "MindOmniUnderstand": ["STRING"],
    }


def test_schemas_hold_what_comfyui_checks(nodes: dict[str, Any]) -> None:
    for node in nodes.values():
        schema = node.define_schema()
        inputs, outputs = [i.id for i in schema.inputs], [o.id for o in schema.outputs]
        assert len({*inputs, *outputs}) == len(inputs) + len(outputs)  # ids are unique between both
        assert schema.search_aliases and schema.description and schema.category == "MindOmni"
        arguments = node.execute.__func__.__code__
        assert set(arguments.co_varnames[1 : arguments.co_argcount]) == set(inputs)


def test_registry_reads_the_project_file() -> None:
    project = tomllib.loads((FOLDER / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["version"] == mindomni_rt.__version__
    assert project["project"]["dependencies"] == ["mindomni-rt[torch]"]
    assert {"PublisherId", "DisplayName"} <= set(project["tool"]["comfy"])


def widgets(node: Any) -> Widgets:
    return [(i.id, bool(i.control_after_generate)) for i in node.define_schema().inputs if i.widget]


def test_example_workflow_runs(
    nodes: dict[str, Any], model: mindomni_rt.Pipeline, alone: mindomni_rt.GenerationResult, comfy: SimpleNamespace
) -> None:
    foreign: dict[str, Widgets] = {"PreviewAny": [], "PreviewImage": [], "SaveImage": [("filename_prefix", False)]}
    prompt = as_prompt(read_workflow(), {name: widgets(node) for name, node in nodes.items()} | foreign)
    found: dict[str, tuple[Any, ...]] = {"1": (model,)}
    for name, entry in prompt.items():  # the file's order is one in which they can run
        given = {k: found[v[0]][v[1]] if isinstance(v, list) else v for k, v in entry["inputs"].items()}
        found[name] = found.get(name) or (
            run(nodes[entry["class_type"]], name, **given) if entry["class_type"] in nodes else tuple(given.values())
        )
    assert found["2"][1:] == (alone.thinking, alone.answer)
    assert found["4"] == ("1 + 2 = 3. a lemon is yellow. a wheel is a circle.",)
    assert torch.equal(found["3"][0], torch.from_numpy(alone.images))
    assert found["6"][2].strip() == "four blue circles"
    assert found["8"] == (["four blue circles"],)
    steps = [(node, step, total) for node, step, total, _ in comfy.utils.shown]
    assert steps == [(node, step, 20) for node in ("3", "6") for step in range(1, 21)]
    previews = [(step, preview[1].size) for node, step, _, preview in comfy.utils.shown if preview and node == "3"]
    assert previews == [(step, (96, 96)) for step in (5, 10, 15)]
    thought = [text for node, text in comfy.server.texts if node == "2"]
    assert len(thought) > 10 and all(b.startswith(a) for a, b in pairwise(thought))
    assert thought[-1].replace("\n", " ").split() == f"{alone.thinking} {alone.answer}".split()


def test_generate_in_one_node(
    nodes: dict[str, Any], model: mindomni_rt.Pipeline, alone: mindomni_rt.GenerationResult, comfy: SimpleNamespace
) -> None:
    image, thinking, answer = run(
        nodes["MindOmniGenerate"], mindomni=model, prompt=RIDDLE, think=True, width=96, height=96, seed=6, batch_size=2,
        **PAINT,
    )  # fmt: skip
    assert (thinking, answer) == (alone.thinking, alone.answer)
    assert image.shape == (2, 96, 96, 3) and image.dtype == torch.float32
    assert torch.equal(image[1:], torch.from_numpy(alone.images))  # image i is painted from seed + i


def test_one_thought_is_painted_twice_with_others_between(
    nodes: dict[str, Any], model: mindomni_rt.Pipeline, alone: mindomni_rt.GenerationResult, comfy: SimpleNamespace
) -> None:
    think = dict(mindomni=model, cascade=False, max_new_tokens=48, temperature=0.0, seed=0)
    first = run(nodes["MindOmniThink"], prompt=RIDDLE, **think)[0]
    second = run(nodes["MindOmniThink"], prompt="draw (2 + 4) things, shaped like a tent", **think)[0]
    size = dict(
        width=96, height=96, batch_size=1, prompt="", think=True, **PAINT | {"guidance": 1.5, "preview_every": 0}
    )
    expected = model.generate(RIDDLE, seed=7, output="numpy", **SMALL | {"guidance_scale": 1.5}, negative_prompt="")
    for thought, same in ((second, False), (first, True), (first, True)):
        image = run(nodes["MindOmniGenerate"], mindomni=model, thought=thought, seed=7, **size)[0]
        assert np.array_equal(image.numpy(), expected.images) is same


def test_edit_and_understand_take_batches(
    nodes: dict[str, Any], model: mindomni_rt.Pipeline, alone: mindomni_rt.GenerationResult, comfy: SimpleNamespace
) -> None:
    pair = torch.from_numpy(np.concatenate([alone.images, alone.images[:, ::-1]]))
    edited, thinking, answer = run(
        nodes["MindOmniEdit"], mindomni=model, image=pair, prompt=CHANGE, think=True,
        width=0, height=96, seed=7, edit_features="auto", **PAINT,
    )  # fmt: skip
    assert edited.shape == (2, 96, 96, 3) and len(thinking.splitlines()) == len(answer.splitlines()) == 2
    one = model.edit(
        np.rint(alone.images[0] * 255).astype(np.uint8), CHANGE, seed=7,
        output="numpy", num_inference_steps=20, guidance_scale=1.0,
    )  # fmt: skip
    assert torch.equal(edited[:1], torch.from_numpy(one.images))
    ask = dict(mindomni=model, prompt="describe the picture.", max_new_tokens=16, temperature=0.0, seed=0)
    (answers,) = run(nodes["MindOmniUnderstand"], image=edited, **ask)
    assert len(answers) == 2 and answers[0] == "four blue circles"
    assert len(run(nodes["MindOmniUnderstand"], **ask)[0]) == 1  # without an image


@pytest.mark.parametrize("during", ["thinking", "painting"])
def test_stop_ends_the_request_at_once(
    nodes: dict[str, Any], model: mindomni_rt.Pipeline, comfy: SimpleNamespace, during: str
) -> None:
    seen = comfy.server.on_text if during == "thinking" else comfy.utils.on_update
    seen.append(lambda _: comfy.state.update(interrupted=True))
    inputs = dict(mindomni=model, prompt=RIDDLE, think=True, width=96, height=96, seed=7, batch_size=1)
    with pytest.raises(comfy.stopped):
        run(nodes["MindOmniGenerate"], **inputs, **PAINT | {"steps": 500})
    assert len(comfy.server.texts) == 1 if during == "thinking" else len(comfy.utils.shown) == 1
    assert not comfy.state["interrupted"]
    seen.clear()
    assert run(nodes["MindOmniGenerate"], **inputs, **PAINT)[2].strip() == "three yellow circles"


def test_pictures_keep_every_value(pack: ModuleType) -> None:
    host = sys.modules[f"{pack.__name__}.host"]
    ramp = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    for channels in (1, 3, 4):
        image = np.repeat(ramp, channels, axis=3)
        (back,) = host.pictures(torch.from_numpy(image.astype(np.float32) / 255.0))  # as LoadImage makes it
        assert np.array_equal(back, image[0] if channels > 1 else image[0, ..., 0])
    assert host.pictures(None) == [None]


def test_models_come_from_comfyui_folders(
    pack: ModuleType, nodes: dict[str, Any], tmp_path: Path, comfy: SimpleNamespace
) -> None:
    models, paths = sys.modules[f"{pack.__name__}.models"], sys.modules["folder_paths"]
    assert list(models.found()) == ["shapes-world-bundle"]
    (tmp_path / "mine" / "mllm").mkdir(parents=True)
    (tmp_path / "no model").mkdir()
    paths.add_model_folder_path("mindomni", str(tmp_path))
    options = nodes["MindOmniLoad"].define_schema().inputs[0].options
    assert options == ["mine", "shapes-world-bundle", models.ELSEWHERE]
    assert models.path_of("mine", "") == str(tmp_path / "mine")
    assert models.path_of(models.ELSEWHERE, " owner/name ") == "owner/name"
    with pytest.raises(ValueError, match="path_or_hub_id is empty"):
        models.path_of(models.ELSEWHERE, "")
    with pytest.raises(ValueError, match="'gone' is in none of"):
        models.path_of("gone", "")


def test_a_thought_of_another_model_is_refused(
    nodes: dict[str, Any], model: mindomni_rt.Pipeline, comfy: SimpleNamespace
) -> None:
    think = dict(prompt=RIDDLE, cascade=False, max_new_tokens=4, temperature=0.0, seed=0)
    thought = run(nodes["MindOmniThink"], mindomni=model, **think)[0]
    with pytest.raises(ValueError, match="the thought is of another model"):
        run(
            nodes["MindOmniGenerate"], mindomni=object(), thought=thought, prompt="", think=True, width=96, height=96,
            seed=0, batch_size=1, **PAINT,
        )  # fmt: skip
