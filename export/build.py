"""From a checkpoint to a bundle: graphs, then engines where the target wants them, then the manifest."""

from __future__ import annotations

import gc
import logging
import platform
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import mindomni_rt
from mindomni_rt.backends.compiled.trt_module import import_tensorrt
from mindomni_rt.bundle.contracts import GraphSpec, Profile, graph_specs, profile
from mindomni_rt.bundle.manifest import GraphEntry, Manifest, hash_files
from mindomni_rt.bundle.writing import write_manifest, writing
from mindomni_rt.checkpoint.layout import open_checkpoint
from mindomni_rt.errors import MissingExtraError
from mindomni_rt.model.mindomni import load_model
from mindomni_rt.outputs import storage_errors

from . import engines
from .graphs import available
from .parts import Parts, attention_dtype, precision_of
from .progress import Progress
from .request import BuildRequest as BuildRequest
from .targets import Choice

logger = logging.getLogger(__name__)
# Weights that stand twice in a bundle of engines, and why.
_WHY = "an engine holds its own weights: none can be stripped where no GPU is, see docs/export.md"
_REPEATED = {
    "prefix": f"the decoder's blocks, also in denoiser.plan; {_WHY}",
    "denoiser_first": f"the decoder's blocks, also in denoiser.plan; {_WHY}",
}
_FILES = (".json", ".txt", ".jinja", ".model")


def build(request: BuildRequest) -> Manifest:
    """Builds a bundle; it appears under its name whole or not at all. A build that was killed goes on, started again
    with the same cache, from the graphs that were done.

    Raises BadCheckpointError, BadBundleError (the name is taken), MissingExtraError, UnsupportedDeviceError,
    EngineBuildError, BuildError (a graph holds other types than the manifest would say), StorageError (a full disk).
    """
    target, choice = request.target, request.choice
    runtime_version = _runtime_version(target.runtime)
    with storage_errors(f"bundle {request.out}"), writing(request.out, request.overwrite) as folder:
        logger.info("cache: %s", _cache_note(request.cache))
        checkpoint = open_checkpoint(request.checkpoint)
        model, report = load_model(checkpoint)  # in its stored type: the tensors stay mapped to their files
        logger.info("%s", report)
        config = model.config
        specs = graph_specs(config)
        names = [n for n in available(model) if _wanted(n, request)]
        work = folder if target.runtime == "onnx" else folder / ".onnx"
        work.mkdir(exist_ok=True)
        progress = Progress(request.say)
        parts = Parts(model, checkpoint, request, work, progress)
        reports = parts.make(names)
        del model
        parts.leave()
        gc.collect()
        sizes = profile(request.profile, config)
        if target.runtime == "onnx":
            entries = {n: _entry(specs[n], choice, work / f"{n}.onnx", reports[n]) for n in names}
            sizes = Profile(name="any")  # onnxruntime takes any size
        else:
            progress.start("engines", {n: _bytes(work / f"{n}.onnx") for n in names})
            entries = {n: _engine(specs[n], request, work, folder, sizes, reports[n], progress) for n in names}
            shutil.rmtree(work)
        _copy_text(request.checkpoint, folder)
        manifest = Manifest(
            model=config,
            runtime=target.runtime,
            runtime_version=runtime_version,
            targets=target.sms,
            dtype=choice.dtype,
            profile=sizes,
            graphs=entries,
            files=progress.timed("hashes", lambda: hash_files(folder)),
            built_by=_builder(),
        )
        write_manifest(folder, manifest)
    parts.forget(request.out)
    progress.summary()
    return manifest


def _cache_note(cache: Path | None) -> str:
    if cache is None:
        return "not used"
    return f"{cache} (empty it with: mindomni export cache --clear)"


def _wanted(name: str, request: BuildRequest) -> bool:
    onnx = request.target.runtime == "onnx"
    return name != "denoiser_first" or onnx or request.condition_only


def _entry(spec: GraphSpec, choice: Choice, file: Path, report: dict[str, Any]) -> GraphEntry:
    data = tuple(engines.external_files(file)) if file.suffix == ".onnx" else ()
    return GraphEntry(
        stage=spec.stage,
        file=file.name,
        precision=precision_of(spec, choice),
        dtype=attention_dtype(spec, choice),
        data=data,
        parts=tuple(report.get("parts", ())),
        report={**{k: v for k, v in report.items() if k != "parts"}, "bytes": _bytes(file)},
    )


def _engine(
    spec: GraphSpec,
    request: BuildRequest,
    work: Path,
    folder: Path,
    sizes: Profile,
    report: dict[str, Any],
    progress: Progress,
) -> GraphEntry:
    out = folder / f"{spec.name}.plan"
    built = engines.build_engine(
        work / f"{spec.name}.onnx",
        out,
        spec,
        sizes,
        dtype=attention_dtype(spec, request.choice),
        runtime=request.target.runtime,
        sms=request.target.sms,
        cache=None if request.cache is None else request.cache / "engines",
        progress=request.progress,
    )
    seconds = 0.0 if built.cached else built.seconds
    progress.spend("engines", seconds)
    progress.done(spec.name, f"{built.bytes / 1e6:.1f} MB " + (f"in {seconds:.1f} s" if seconds else "kept"), seconds)
    more: dict[str, Any] = {
        "build_seconds": built.seconds,
        "attention": built.attention,
        "fused_attention": built.fused,
    }
    if spec.name in _REPEATED:
        more["repeats"] = _REPEATED[spec.name]
    entry = _entry(spec, request.choice, out, {**report, **more})
    return replace(entry, file=out.name)


def _bytes(file: Path) -> int:
    """Bytes of an engine, or of a graph with its data files."""
    data = engines.external_files(file) if file.suffix == ".onnx" else []
    return file.stat().st_size + sum((file.parent / name).stat().st_size for name in data)


def _copy_text(checkpoint: Path, folder: Path) -> None:
    """Tokenizer, chat template and preprocessing files: all that is left of the checkpoint."""
    (folder / "mllm").mkdir()
    for path in sorted((checkpoint / "mllm").iterdir()):
        if path.suffix in _FILES and ".index." not in path.name:
            shutil.copyfile(path, folder / "mllm" / path.name)


def _runtime_version(runtime: str) -> str:
    """Version of the library that will read the bundle; its absence is an error before any work."""
    if runtime != "onnx":
        return str(import_tensorrt(runtime).__version__)
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("onnxruntime", "export") from error
    return str(onnxruntime.__version__)


def _builder() -> dict[str, Any]:
    import onnx

    return {
        "mindomni_rt": mindomni_rt.__version__,
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
