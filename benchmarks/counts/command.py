"""`python -m benchmarks counts`: what a fixed request costs, in numbers that no clock and no busy machine can change.

Stage by stage through the torch backend on the CPU: floating-point operations, operators dispatched, bytes allocated
and the most of them alive. Token ids, image and noise are fixed, nothing ends a text early, and weights change no
shape: the counts follow from the code and the configuration. Beside them the nodes and weights of a bundle's graphs.
`compare` holds two such results together: the gate of CI (tests/benchmarks/test_counts.py).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from mindomni_rt.errors import BadRequestError, MissingExtraError

from ..latency.command import versions
from ..machine import commit
from ..results import FOLDER, FORMAT, write_json

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "tests" / "fixtures" / "parity"
BUNDLE = ROOT / "assets" / "shapes-world-bundle"
BASELINE = FOLDER / "counts-baseline.json"
REQUEST: dict[str, Any] = {"patches": [8, 8], "prompt": 20, "negative": 6, "new_tokens": 5, "side": 96, "steps": 3}
"""Patches of the reference image, tokens of both prompts, tokens written, pixels a side, steps."""
Frame = Callable[[], AbstractContextManager[Any]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("model", nargs="?", type=Path, default=MODEL, help="a checkpoint folder; default: the tests'")
    parser.add_argument("--bundle", type=Path, default=BUNDLE, help="ONNX graphs to count")
    parser.add_argument("--out", type=Path, help="a .json file")


def run(options: argparse.Namespace) -> int:
    """Counts and reports."""
    if options.out and options.out.suffix != ".json":
        raise BadRequestError(f"--out {options.out}: expected a name that ends in .json")
    data = measure(options.model, options.bundle)
    sys.stdout.write(report(data))
    if options.out:
        write_json(options.out, data)
    return 0


def measure(model: Path = MODEL, bundle: Path = BUNDLE) -> dict[str, Any]:
    """The result: {"stages": {stage: counts}, "graphs": {graph: counts}, "operators": {stage: calls by name}}."""
    try:
        import torch
    except ImportError as error:
        raise MissingExtraError("torch", "bench") from error
    from mindomni_rt.backends.torch.backend import TorchBackend, load_torch

    from .counter import counting, counting_flops

    backend = load_torch(model, "cpu", "float32")
    assert isinstance(backend, TorchBackend)
    for _ in stages(backend, counting):  # what is made once, on first use, is not part of a request
        pass
    found: dict[str, dict[str, int]] = {}
    for name, units, counter in stages(backend, counting_flops):
        found[name] = {"units": units, "flops": int(counter.get_total_flops())}
    operators: dict[str, dict[str, int]] = {}
    for name, _, counter in stages(backend, counting):
        operators[name] = dict(sorted(counter.by_name.items()))
        found[name] |= {"operators": counter.operators, "bytes": counter.bytes, "peak_bytes": counter.peak}
    return {
        "kind": "counts",
        "format": FORMAT,
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "versions": versions(),
        "torch": ".".join(torch.__version__.split(".")[:2]),
        "model": {"name": model.name, "config": json.loads(json.dumps(backend.config.to_dict()))},
        "bundle": bundle.name,
        "request": REQUEST,
        "stages": found,
        "graphs": count_graphs(bundle),
        "operators": operators,
    }


def stages(backend: Any, frame: Frame) -> Iterator[tuple[str, int, Any]]:
    """The fixed request: (stage, units of its work, what `frame` gave around it)."""
    from mindomni_rt.backends.base import DenoiseRequest, LanguageRequest
    from mindomni_rt.inputs.images import ImagePatches
    from mindomni_rt.sampling.decode import generate_tokens
    from mindomni_rt.sampling.denoise import denoise
    from mindomni_rt.sampling.schedule import timesteps

    config, sizes = backend.config, REQUEST
    rows, columns = sizes["patches"]
    side, steps, new = sizes["side"], sizes["steps"], sizes["new_tokens"]

    def language(tokens: Any, wanted: int) -> Any:
        return backend.language(
            LanguageRequest(
                token_ids=np.zeros(tokens, np.int64),
                positions=np.tile(np.arange(tokens), (3, 1)),
                next_position=tokens,
                max_new_tokens=wanted,
            )
        )

    patches = ImagePatches(np.zeros((rows * columns, config.vision.patch_dim), np.float32), (1, rows, columns))
    with frame() as counter:
        backend.vision(patches)
    yield "vision", 1, counter
    with frame() as counter:
        thought = language(sizes["prompt"], new)
        tokens = generate_tokens(thought)
        next(tokens)
    yield "language.prefill", 1, counter
    with frame() as counter:
        for _ in range(new - 1):
            next(tokens)
    yield "language.decode", new - 1, counter
    hidden = [thought.hidden(new), language(sizes["negative"], 0).hidden()]
    with frame() as counter:
        conditions = [backend.connector(h) for h in hidden]
    yield "connector", 2, counter
    times = timesteps(steps)
    with frame() as counter:
        prefixes = [backend.prefix(c, times[:-1], (side // 16) ** 2) for c in conditions]
    yield "prefix", 2, counter
    request = DenoiseRequest(
        latents=np.zeros((1, config.decoder.latent_channels, side // 8, side // 8), np.float32),
        times=times,
        guided=prefixes[0],
        unguided=prefixes[1],
        guidance_scale=3.0,
    )
    with frame() as counter:
        latents = [state.latents for state in denoise(backend, request)][-1]
    yield "denoiser", steps, counter
    with frame() as counter:
        backend.vae(latents)
    yield "vae", 1, counter


def count_graphs(bundle: Path) -> dict[str, dict[str, int]]:
    """Nodes of each graph (those of its branches and functions too) and bytes of its weights; empty without `onnx`."""
    from mindomni_rt.bundle.manifest import is_bundle, read_manifest

    try:
        import onnx
    except ImportError:
        sys.stderr.write("graphs are not counted: onnx is not installed: pip install mindomni-rt[export]\n")
        return {}
    if not is_bundle(bundle):
        sys.stderr.write(f"graphs are not counted: no bundle at {bundle.name}\n")
        return {}
    found = {}
    for name, graph in sorted(read_manifest(bundle).graphs.items()):
        model = onnx.load(bundle / graph.file, load_external_data=False)
        nodes = _nodes(model.graph) + sum(len(f.node) for f in model.functions)
        found[name] = {"nodes": nodes, "weight_bytes": sum(_bytes(t) for t in model.graph.initializer)}
    return found


def _nodes(graph: Any) -> int:
    inner = [a.g for node in graph.node for a in node.attribute if a.HasField("g")]
    return len(graph.node) + sum(_nodes(g) for g in inner)


def _bytes(tensor: Any) -> int:
    from onnx.helper import tensor_dtype_to_np_dtype

    return int(np.prod(tuple(tensor.dims), dtype=np.int64)) * int(tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def report(data: Mapping[str, Any]) -> str:
    """Text tables; a stage's row divided by its units where it has several."""
    lines = [f"{data['model']['name']}, torch {data['torch']}, commit {data['commit']}; per unit of work", ""]
    lines.append(f"{'stage':18} {'units':>5} {'Mflop':>10} {'operators':>10} {'kB made':>10} {'kB peak':>10}")
    for name, row in data["stages"].items():
        n = row["units"]
        each = f"{row['flops'] / n / 1e6:10.3f} {row['operators'] / n:10.1f} {row['bytes'] / n / 1e3:10.1f}"
        lines.append(f"{name:18} {n:5} {each} {row['peak_bytes'] / 1e3:10.1f}")
    if data["graphs"]:
        lines += ["", f"{data['bundle'] + ' graph':36} {'nodes':>6} {'kB of weights':>14}"]
        lines += [f"{k:36} {row['nodes']:6} {row['weight_bytes'] / 1e3:14.1f}" for k, row in data["graphs"].items()]
    return "\n".join(lines) + "\n"
