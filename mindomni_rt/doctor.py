"""`mindomni doctor`: what is here, what each backend lacks, and what a model would run in. Needs no torch."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from . import checkout
from .errors import MindOmniError
from .extras import install
from .memory.machine import Machine, read_machine
from .memory.planner import gigabytes

HELP = "what this machine has, what each backend lacks, and what a model would run in here"
_VERSIONS = (
    *("numpy", "torch", "safetensors", "huggingface_hub", "tokenizers", "triton", "onnxruntime", "onnxruntime-gpu"),
    *("tensorrt-rtx", "tensorrt", "cuda-core", "cuda-bindings", "onnx", "onnxscript", "transformers", "diffusers"),
)


@dataclass(frozen=True, kw_only=True)
class Part:
    """Something that works only with certain modules. extra: what installs them."""

    name: str
    serves: str
    modules: tuple[str, ...]
    extra: str


_PARTS = (
    Part(
        name="torch",
        serves="checkpoints on a CPU or an NVIDIA GPU",
        modules=("torch", "safetensors", "huggingface_hub"),
        extra="torch",
    ),
    Part(name="fast path", serves="kernels of the torch backend on a GPU", modules=("torch", "triton"), extra="fast"),
    Part(name="onnx", serves="bundles built for cpu", modules=("onnxruntime",), extra="onnx"),
    Part(
        name="tensorrt",
        serves="bundles built for an RTX GPU",
        modules=("tensorrt_rtx", "cuda.core", "cuda.bindings"),
        extra="trt",
    ),
    Part(
        name="export", serves="building bundles", modules=("torch", "onnx", "onnxscript", "onnxruntime"), extra="export"
    ),
)


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Everything found, as plain data. backends: what each lacks; model: None unless one was asked about."""

    versions: Mapping[str, str]
    system: str
    machine: Machine
    backends: Mapping[str, Mapping[str, Any]]
    folders: Mapping[str, Mapping[str, Any]]
    notes: tuple[str, ...] = ()
    model: Mapping[str, Any] | None = field(default=None)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able data."""
        return asdict(self)

    def __str__(self) -> str:
        machine = self.machine
        fast = "multiplies bfloat16 at speed" if machine.bfloat16 else "has no fast bfloat16"
        host = f"{gigabytes(machine.host.free)} of {gigabytes(machine.host.total)} free" if machine.host else "unknown"
        lines = [f"{self.system}; " + ", ".join(f"{name} {found}" for name, found in self.versions.items())]
        lines += ["", f"cpu      {machine.cpu}, {machine.cores} cores, {fast}", f"memory   {host}"]
        for gpu in machine.gpus:
            free = (
                "the host's memory"
                if gpu.free is None
                else f"{gigabytes(gpu.free)} of {gigabytes(gpu.total or 0)} free"
            )
            lines.append(f"cuda:{gpu.index}   {gpu.name} (sm_{gpu.capability[0]}{gpu.capability[1]}), {free}")
        lines += [] if machine.gpus else ["gpu      none found"]
        lines.append("")
        for name, state in self.backends.items():
            lacks = f"lacks {', '.join(state['lacks'])}: {state['install']}" if state["lacks"] else "ready"
            lines.append(f"{name:10}{lacks} ({state['serves']})")
        lines += ["", *(f"{name:10}{state['path']}{_size(state)}" for name, state in self.folders.items())]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines + _model_lines(self.model))


def _size(state: Mapping[str, Any]) -> str:
    return f" ({gigabytes(state['bytes'])})" if state["bytes"] is not None else " (not there yet)"


def _model_lines(model: Mapping[str, Any] | None) -> list[str]:
    if model is None:
        return []
    lines = ["", f"model    {model['path']}: {model['kind']}"]
    if "error" in model:
        return [*lines, f"  cannot be read: {model['error']}"]
    lines += [f"  recommends {model['recommended']}"]
    for device, found in model["devices"].items():
        lines.append(f"  {device}: {found['fits'] or found['error']}")
        if found.get("speed"):
            lines.append(f"  {' ' * len(device)}  prediction: {found['speed']}")
    return lines


def examine(model: str | Path | None = None, machine: Machine | None = None) -> Diagnosis:
    """Looks at this machine, and at a model that is here (nothing is downloaded). machine: another one, for tests."""
    machine = machine or read_machine()
    return Diagnosis(
        versions={"python": platform.python_version(), **checkout.installed(("mindomni-rt", *_VERSIONS))},
        system=f"{platform.system()} {platform.machine()}",
        machine=machine,
        backends={part.name: _state(part) for part in _PARTS},
        folders={name: _folder(path) for name, path in _folders(os.environ).items()},
        notes=tuple(_notes(machine)),
        model=None if model is None else _model(model, machine),
    )


def _present(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # a parent is missing, or a test put None in its place
        return False


def _state(part: Part) -> dict[str, Any]:
    return {
        "serves": part.serves,
        "lacks": [module for module in part.modules if not _present(module)],
        "install": install(part.extra),
    }


def _folders(environment: Mapping[str, str]) -> dict[str, Path]:
    """Where downloads, compiled kernels and engines are kept, by the variables that each library honours."""
    home = Path.home()
    cache = Path(environment.get("XDG_CACHE_HOME") or home / ".cache")
    hub = environment.get("HF_HUB_CACHE") or Path(environment.get("HF_HOME") or cache / "huggingface") / "hub"
    triton = environment.get("TRITON_CACHE_DIR") or Path(environment.get("TRITON_HOME") or home) / ".triton" / "cache"
    return {"downloads": Path(hub), "triton": Path(triton), "own cache": cache / "mindomni-rt"}


def _folder(path: Path) -> dict[str, Any]:
    """A folder and its bytes; links are not followed, so what the hub's cache links to counts once."""
    size = None
    if path.is_dir():
        size = sum((Path(folder) / name).lstat().st_size for folder, _, names in os.walk(path) for name in names)
    return {"path": str(path), "bytes": size}


def _notes(machine: Machine) -> list[str]:
    from .backends.compiled.providers import installed

    notes = []
    if len(installed()) > 1:
        notes.append(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other: uninstall both, install one"
        )
    if machine.gpus and _present("onnxruntime") and "onnxruntime-gpu" not in installed():
        notes.append(f"onnx bundles run on the CPU; for CUDA pip uninstall onnxruntime, then {install('onnx-gpu')}")
    return notes


def _model(model: str | Path, machine: Machine) -> dict[str, Any]:
    from .bundle.manifest import is_bundle
    from .checkpoint.hub import resolve
    from .describe import read_recommended

    found: dict[str, Any] = {"path": str(model), "kind": "unknown"}
    try:
        folder = resolve(model, local_files_only=True)
        found["kind"] = "bundle" if is_bundle(folder) else "checkpoint"
        found["recommended"] = str(read_recommended(folder))
        found["devices"] = _bundle(folder, machine) if is_bundle(folder) else _checkpoint(folder, machine)
    except MindOmniError as error:
        found["error"] = str(error)
    return found


def _checkpoint(folder: Path, machine: Machine) -> dict[str, Any]:
    from .checkpoint.layout import open_checkpoint
    from .memory.fit import fit_checkpoint
    from .memory.precision import parse_precision
    from .memory.speed import predict_cpu, predict_gpu

    checkpoint = open_checkpoint(folder)
    found: dict[str, Any] = {}
    for device in (*(f"cuda:{gpu.index}" for gpu in machine.gpus), "cpu"):
        try:
            fit = fit_checkpoint(checkpoint, machine, device=device)
        except MindOmniError as error:
            found[device] = {"fits": None, "error": str(error)}
            continue
        assert fit.dtype is not None
        if device == "cpu":
            speed = predict_cpu(checkpoint.config, fit.dtype, min(fit.side, 512))
        else:
            kind = parse_precision(fit.precision, fit.dtype).decoder if fit.precision else fit.dtype
            speed = predict_gpu(checkpoint.config, kind, machine.gpu(device).name)
        found[device] = {"fits": fit.summary(), "fit": fit.to_dict(), "speed": str(speed) if speed else None}
    return found


def _bundle(folder: Path, machine: Machine) -> dict[str, Any]:
    from .bundle.manifest import read_manifest
    from .memory.bundle_fit import fit_bundle
    from .memory.speed import predict_cpu

    manifest = read_manifest(folder)
    cuda = tuple(f"cuda:{gpu.index}" for gpu in machine.gpus)
    found: dict[str, Any] = {}
    if manifest.runtime != "onnx" and not cuda:
        return {"cuda": {"fits": None, "error": f"no GPU here; the bundle is for {', '.join(manifest.targets)}"}}
    for device in ("cpu",) if manifest.runtime == "onnx" else cuda:
        try:
            if device != "cpu":
                major, minor = machine.gpu(device).capability
                manifest.check_device(f"sm_{major}{minor}")
            fit = fit_bundle(manifest, machine, folder=folder, device=device)
        except MindOmniError as error:
            found[device] = {"fits": None, "error": str(error)}
            continue
        kinds = {graph.stage: graph.precision for graph in manifest.graphs.values()}
        speed = predict_cpu(manifest.model, _kind(kinds["language"]), min(fit.side, 512)) if device == "cpu" else None
        found[device] = {"fits": fit.summary(), "fit": fit.to_dict(), "speed": str(speed) if speed else None}
    return found


def _kind(precision: str) -> str:
    names = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "int8wo": "int8", "mixed": "float32"}
    return names.get(precision, precision)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--model", metavar="PATH_OR_HUB_ID", help="a checkpoint or bundle that is already here")


def run(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """The diagnosis as text and as data."""
    found = examine(options.model)
    return str(found), found.to_dict()
