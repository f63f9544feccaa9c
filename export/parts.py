"""All graphs of a bundle: traced or taken from the cache, weights rounded into shared data files, what each holds."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

from mindomni_rt.bundle.contracts import GraphSpec, graph_specs
from mindomni_rt.checkpoint.layout import Checkpoint
from mindomni_rt.files import parse_json, write_text
from mindomni_rt.kernels.onnx_function import add_function
from mindomni_rt.memory.precision import KINDS
from mindomni_rt.model.mindomni import MindOmniModel

from . import quantize
from .cache import WEIGHTS, Unfinished, identity, key_of, unshare
from .calibrate import calibrate
from .graphs import halve_attention, wrapper_of
from .progress import Progress
from .request import BuildRequest
from .split import split
from .store import WeightStore, write_graph
from .targets import Choice
from .traces import Traces, fill
from .weights import bytes_by_type, check_weights, promise, read_weights

logger = logging.getLogger(__name__)
# Graphs that share a data file, because they share weights.
_DATA = {
    "vision": "vision",
    "language": "language",
    "choose": "language",
    "connector": "connector",
    "features": "connector",
    "prefix": "decoder",
    "denoiser": "decoder",
    "denoiser_first": "decoder",
    "update": "decoder",
    "vae": "vae",
    "vae_encode": "vae",
}
# The graph that an application waits for, and the output that is as what passes between its layers. It is divided
# where its weights take long to open.
_DIVIDED, _LIKE, _PARTS, _LARGE = "language", "hidden", 8, 1 << 30
_FLOAT32 = ("choose", "update")  # arithmetic on a few numbers, without weights
_TRACE_COST, _NUMBERS_A_SECOND = 2.0, 5e7  # seconds a layer to trace, numbers to round: to judge the time left by


def precision_of(spec: GraphSpec, choice: Choice) -> str:
    """What a graph's matrices are stored in. Graphs beside a stage's own hold no large ones."""
    plain = KINDS[choice.dtype].short
    if spec.name in _FLOAT32:
        return "fp32"
    return plain if spec.name == "features" else choice.stages[spec.stage]


def attention_dtype(spec: GraphSpec, choice: Choice) -> str:
    """The type in which a graph's attention computes."""
    if spec.stage != "vae":
        return "float32" if spec.name in _FLOAT32 else choice.dtype
    return {"fp32": "float32", "bf16": "bfloat16"}.get(choice.stages["vae"], "float16")


class Parts:
    """Makes the graphs of a model in a folder, set by set: a set shares a data file, and is kept once it is whole."""

    def __init__(
        self, model: MindOmniModel, checkpoint: Checkpoint, request: BuildRequest, work: Path, progress: Progress
    ) -> None:
        self._model, self._request, self._work, self._progress = model, request, work, progress
        self._specs, self._choice = graph_specs(model.config), request.choice
        cache = request.cache
        self._ranges_folder = None if cache is None else cache / "ranges"
        self._unfinished = Unfinished(None if cache is None else cache / "unfinished")
        self._keys: list[str] = []
        entries = (entry for part in checkpoint.tensors.values() for entry in part.values())
        self._weights = [] if cache is None else identity(entry.file for entry in entries)
        self._traces = Traces(
            model,
            self._choice.dtype,
            self._choice.stages["vae"],
            request.attention,
            None if cache is None else cache / "graphs",
        )

    def make(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Writes every graph. Returns what is to be said of each in the manifest."""
        ranges = self._ranges()
        if self._choice.stages["vae"] == "mixed":
            halve_attention(self._model)
        self._progress.start("graph", {name: self._cost(name) for name in names})
        reports: dict[str, dict[str, Any]] = {}
        for data in dict.fromkeys(_DATA[name] for name in names):
            group = [name for name in names if _DATA[name] == data]
            key = self._key(group, ranges)
            found = self._unfinished.take(key, self._work)
            if found is None:
                found = self._make(group, data, ranges)
                files = [file for name in group for file in (f"{name}.onnx", *found[name].get("parts", ()))]
                self._unfinished.keep(key, self._work, [f"{data}.data", *files], found)
            else:
                for name in group:
                    self._progress.done(name, "from a build that did not end", 0.0)
            self._keys.append(key)
            reports.update(found)
        return {name: reports[name] for name in names}

    def leave(self) -> None:
        """Lets go of the model: engines need the memory."""
        del self._model, self._traces

    def forget(self, bundle: Path) -> None:
        """Drops what was kept for a build that did not end: `bundle` is whole. Its graphs have no other name then."""
        for key in self._keys:
            self._unfinished.drop(key)
        for path in (*bundle.glob("*.onnx"), *bundle.glob("*.data")):
            unshare(path)

    def _make(self, group: Sequence[str], data: str, ranges: Mapping[str, float]) -> dict[str, dict[str, Any]]:
        with WeightStore(self._work / f"{data}.data") as store:
            return {name: self._graph(name, store, ranges) for name in group}

    def _graph(self, name: str, store: WeightStore, ranges: Mapping[str, float]) -> dict[str, Any]:
        spec = self._specs[name]
        precision = precision_of(spec, self._choice)
        traced, seconds = self._traces.get(name)
        began = time.perf_counter()
        fill(traced, self._model, name)
        report: dict[str, Any] = {}
        if precision in quantize.PASSES:
            packed = self._request.target.runtime == "onnx" and self._choice.dtype == "float32"
            report |= quantize.quantize(traced, precision, ranges, store, packed=packed).to_dict()
        file = self._work / f"{name}.onnx"
        write_graph(traced, file, store)
        if self._request.attention == "triton" and name == "denoiser":
            onnx.save(add_function(onnx.load(str(file), load_external_data=False)), str(file))
        report |= self._held(spec, file)
        if (
            name == _DIVIDED
            and self._request.target.runtime == "onnx"
            and sum(report["bytes_by_type"].values()) > _LARGE
        ):
            layers = self._model.config.language.stack.num_layers
            report["parts"] = [part.name for part in split(file, layers, _PARTS, _LIKE)]
        written = time.perf_counter() - began
        report["export_seconds"] = round(seconds + written, 2)
        self._progress.spend("tracing", seconds)
        self._progress.spend("weights", written)
        how = f"traced in {seconds:.1f} s" if seconds else "trace from the cache"
        size = sum(report["bytes_by_type"].values()) / 1e6
        self._progress.done(name, f"{how}, {size:.1f} MB of weights written in {written:.1f} s", seconds + written)
        return report

    def _held(self, spec: GraphSpec, file: Path) -> dict[str, Any]:
        """What the written graph holds, for the manifest. Raises BuildError where that is not what was asked for."""
        found = read_weights(file)
        promised = promise(spec, precision_of(spec, self._choice), attention_dtype(spec, self._choice))
        check_weights(spec, found, promised)
        return {"weights": promised, "bytes_by_type": bytes_by_type(found)}

    def _ranges(self) -> Mapping[str, float]:
        """Ranges of activations, where a stage's precision needs them: from an earlier calibration or a new one."""
        if not any(p in quantize.CALIBRATED for p in self._choice.stages.values()):
            return {}
        request = self._request
        settings = {"prompts": list(request.prompts), "size": request.calibration_size, "weights": self._weights}
        kept = None if self._ranges_folder is None else self._ranges_folder / f"{key_of(settings, WEIGHTS)}.json"
        if kept is not None and kept.is_file():
            logger.info("calibration taken from %s", kept)
            found: dict[str, float] = parse_json(kept.read_bytes())
            return found
        steps = [f"prompt {place}" for place in range(1, len(request.prompts) + 1)]
        self._progress.start("calibration", dict.fromkeys(steps, 1.0))
        self._progress.tell(f"calibration: the model paints for each of {len(steps)} prompts")

        def done(place: int, seconds: float) -> None:
            self._progress.done(steps[place], f"{seconds:.1f} s", seconds)

        size = request.calibration_size
        ranges = self._progress.timed(
            "calibration",
            lambda: calibrate(self._model, request.checkpoint, request.prompts, size, done=done),
        )
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_text(kept, json.dumps(ranges))
        return ranges

    def _key(self, group: Sequence[str], ranges: Mapping[str, float]) -> str:
        choice = self._choice
        calibrated = any(precision_of(self._specs[n], choice) in quantize.CALIBRATED for n in group)
        return key_of(
            {
                "weights": self._weights,
                "model": self._model.config.to_dict(),
                "graphs": {name: precision_of(self._specs[name], choice) for name in group},
                "dtype": choice.dtype,
                "vae": choice.stages["vae"],
                "attention": self._request.attention,
                "runtime": self._request.target.runtime,
                "ranges": dict(ranges) if calibrated else {},
            },
            WEIGHTS,
        )

    def _cost(self, name: str) -> float:
        layers = sum(tensor.name.startswith(("keys_", "values_")) for tensor in self._specs[name].inputs) // 2
        stack = {"decoder": self._model.config.decoder.stack, "connector": self._model.config.connector.stack}
        layers = layers or getattr(stack.get(_DATA[name]), "num_layers", 8)
        numbers = sum(p.numel() for p in wrapper_of(self._model, name).parameters())
        first = next(n for n, data in _DATA.items() if data == _DATA[name]) == name  # the others find weights written
        return _TRACE_COST * layers + (numbers / _NUMBERS_A_SECOND if first else 0.0)
