"""`mindomni bench counts`: what a fixed request costs, in numbers that do not depend on the machine's speed.

Stage by stage through the torch backend on the CPU: floating-point operations, operators dispatched, bytes allocated
and the most of them alive. Token ids, image and noise are fixed, nothing ends a text early, and weights change no
shape: the counts follow from the code and the configuration. Beside them the nodes and weights of a bundle's graphs.
`compare` compares two such results: the gate of CI (tests/benchmarks/test_counts.py).
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from mindomni_rt.backends.torch.backend import TorchBackend, load_torch
from mindomni_rt.demo import DEMO_MODELS
from mindomni_rt.errors import BadRequestError
from mindomni_rt.extras import install
from mindomni_rt.loading import resolve_checkpoint
from mindomni_rt.memory.layers import Workload

from .machine import header
from .results import FOLDER, check_out, table, write_json
from .stages import Stages

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "tests" / "fixtures" / "parity"
BUNDLE = DEMO_MODELS[0][0]
BASELINE = FOLDER / "counts-baseline.json"
REQUEST: dict[str, Any] = {"patches": [8, 8], "prompt": 20, "negative": 6, "new_tokens": 5, "side": 96, "steps": 3}
"""Patches of the reference image, tokens of both prompts, tokens written, pixels a side, steps."""
UNITS = {"vision": 1, "language.prefill": 1, "language.decode": 4, "connector": 2, "prefix": 2, "denoiser": 3, "vae": 1}
"""Of each stage's work in it: tokens, branches, steps."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument(
        "model",
        nargs="?",
        type=Path,
        default=MODEL,
        help="a checkpoint, or demo (the small model); default: the tests'",
    )
    parser.add_argument("--bundle", type=Path, default=BUNDLE, help="ONNX graphs to count")
    parser.add_argument("--out", type=Path, help="a .json file")


def run(options: argparse.Namespace) -> int:
    """Counts and reports."""
    check_out(options.out)
    if options.model == MODEL and not MODEL.is_dir():
        raise BadRequestError(
            "the checkpoint of the baseline's counts comes with the repository's tests, not with an installation: give "
            "a folder, or demo (the small model)"
        )
    data = measure(resolve_checkpoint(options.model), options.bundle)
    sys.stdout.write(report(data))
    if options.out:
        write_json(options.out, data)
    return 0


def measure(model: Path = MODEL, bundle: Path = BUNDLE) -> dict[str, Any]:
    """The result: {"stages": {stage: counts}, "graphs": {graph: counts}, "operators": {stage: calls by name}}."""
    backend = load_torch(model, "cpu", "float32")
    assert isinstance(backend, TorchBackend)
    count(backend, counting)  # what is made once, on first use, is not part of a request
    flops, counters, found = count(backend, counting_flops), count(backend, counting), dict[str, dict[str, int]]()
    for name, counter in counters.items():
        found[name] = {"units": UNITS[name], "flops": int(flops[name].get_total_flops())}
        found[name] |= {"operators": counter.operators, "bytes": counter.bytes, "peak_bytes": counter.peak}
    return {
        **header("counts"),
        "torch": ".".join(torch.__version__.split(".")[:2]),
        "model": {"name": model.name, "config": json.loads(json.dumps(backend.config.to_dict()))},
        "bundle": bundle.name,
        "request": REQUEST,
        "stages": found,
        "graphs": count_graphs(bundle),
        "operators": {name: dict(sorted(counter.by_name.items())) for name, counter in counters.items()},
    }


def count(backend: Any, probe: Callable[[], AbstractContextManager[Any]]) -> dict[str, Any]:
    """The fixed request: what `probe` gave around each stage."""
    found: dict[str, Any] = {}

    @contextmanager
    def frame(name: str) -> Iterator[None]:
        with probe() as found[name]:
            yield

    side, patches = REQUEST["side"], tuple(REQUEST["patches"])
    work = Workload(
        prompt_tokens=REQUEST["prompt"], negative_tokens=REQUEST["negative"], new_tokens=REQUEST["new_tokens"],
        height=side, width=side, steps=REQUEST["steps"],
    )  # fmt: skip
    Stages(backend, replace(work, patches=patches)).look(frame)
    Stages(backend, work).run(frame)
    return {name: found[name] for name in UNITS}  # without the negative prompt, whose states are kept across requests


class Counter(TorchDispatchMode):
    """Counts operators as they are dispatched, and the memory behind what they return.

    operators: calls of any operator. bytes: of new storages, views and in-place results left out. peak: the most of
    them alive at once. Memory that an operator uses inside is not seen; neither is what numpy holds.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators = self.bytes = self.peak = self._live = 0
        self.by_name: dict[str, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = {_address(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        self.operators += 1
        self.by_name[str(func)] = self.by_name.get(str(func), 0) + 1
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (place := _address(tensor)) not in given:
                given.add(place)
                self._made(tensor.untyped_storage())
        return out

    def _made(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self.bytes += size
        self._live += size
        self.peak = max(self.peak, self._live)
        weakref.finalize(storage, self._gone, size).atexit = False

    def _gone(self, size: int) -> None:
        self._live -= size


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@contextmanager
def counting() -> Iterator[Counter]:
    """Counts a block. Reference counts alone free memory in it, so that the peak is the same in every run."""
    gc.collect()
    gc.disable()
    try:
        with Counter() as counter:
            yield counter
    finally:
        gc.enable()


@contextmanager
def counting_flops() -> Iterator[FlopCounterMode]:
    """Two for each multiply-add of products, convolutions and attention; masked pairs of attention count too."""
    # The counter does not know the CPU's fused attention; the plain one is made of products that it knows.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        yield counter


def count_graphs(bundle: Path) -> dict[str, dict[str, int]]:
    """Nodes of each graph (those of its branches and functions too) and bytes of its weights; empty without `onnx`."""
    from mindomni_rt.bundle.manifest import is_bundle, read_manifest

    try:
        import onnx
    except ImportError:
        sys.stderr.write(f"graphs are not counted: onnx is not installed: {install('export')}\n")
        return {}
    if not is_bundle(bundle):
        sys.stderr.write(f"graphs are not counted: no bundle at {bundle.name}\n")
        return {}
    found = {}
    for name, graph in sorted(read_manifest(bundle).graphs.items()):
        model = onnx.load(bundle / graph.file, load_external_data=False)
        nodes = _nodes(model.graph) + sum(len(f.node) for f in model.functions)
        kinds = [(t.dims, onnx.helper.tensor_dtype_to_np_dtype(t.data_type)) for t in model.graph.initializer]
        found[name] = {"nodes": nodes, "weight_bytes": sum(prod(dims) * kind.itemsize for dims, kind in kinds)}
    return found


def _nodes(graph: Any) -> int:
    inner = [a.g for node in graph.node for a in node.attribute if a.HasField("g")]
    return len(graph.node) + sum(_nodes(g) for g in inner)


def report(data: Mapping[str, Any]) -> str:
    """Tables; a stage's row is divided by its units where it has several."""
    rows = []
    for name, row in data["stages"].items():
        n = row["units"]
        each = f"{row['flops'] / n / 1e6:.3f}", f"{row['operators'] / n:.1f}", f"{row['bytes'] / n / 1e3:.1f}"
        rows.append([name, n, *each, f"{row['peak_bytes'] / 1e3:.1f}"])
    graphs = [[name, row["nodes"], f"{row['weight_bytes'] / 1e3:.1f}"] for name, row in data["graphs"].items()]
    lines = [
        f"{data['model']['name']}, torch {data['torch']}, commit {data['commit']}; per unit of work",
        table(["stage", "units", "Mflop", "operators", "kB made", "kB peak"], rows),
        *([table([f"{data['bundle']} graph", "nodes", "kB of weights"], graphs)] if graphs else []),
    ]
    return "\n\n".join(lines) + "\n"
