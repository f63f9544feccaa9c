"""The peer that runs our own graphs: onnxruntime as its tutorial shows it, numpy in and out, default options."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mindomni_rt.backends.compiled.backend import CompiledBackend
from mindomni_rt.backends.compiled.onnx import OnnxRunner, load_onnx
from mindomni_rt.backends.compiled.runner import NUMPY, DeviceArray
from mindomni_rt.bundle.manifest import Bundle, open_bundle
from mindomni_rt.errors import BadRequestError
from mindomni_rt.memory.layers import Workload

from ..stages import Stages
from .pairs import BOUNDS, Group, Match, Pair, after_first, timed


class PlainRunner(OnnxRunner):
    """Graphs through `session.run`, which makes new outputs, caches among them, in every call.

    An array's owner is a list of one numpy array, whose place a new output takes: it is not copied once more.
    """

    def __init__(self, bundle: Bundle, provider: str) -> None:
        super().__init__(bundle)
        self._provider, self._plain = provider, dict[str, Any]()

    def empty(self, shape: tuple[int, ...], dtype: str) -> DeviceArray:
        return DeviceArray(0, shape, dtype, [np.zeros(shape, NUMPY[dtype])])

    def write(self, target: DeviceArray, values: NDArray[Any]) -> None:
        _held(target)[...] = values

    def get(self, array: DeviceArray) -> NDArray[Any]:
        return _held(array).copy()

    def run(self, graph: str, inputs: Mapping[str, DeviceArray], outputs: Mapping[str, DeviceArray]) -> None:
        import onnxruntime

        if graph not in self._plain:
            path, options = self._bundle.path(self._bundle.manifest.graphs[graph].file), onnxruntime.SessionOptions()
            options.log_severity_level = 3  # it warns of every cache that it copies, and printing takes its time
            self._plain[graph] = onnxruntime.InferenceSession(str(path), options, providers=[self._provider])
        session = self._plain[graph]
        values = session.run(None, {i.name: _held(inputs[i.name]) for i in session.get_inputs()})
        for output, value in zip(session.get_outputs(), values, strict=True):
            array = outputs[output.name]
            if array.owner[0].nbytes == value.nbytes:
                array.owner[0] = value
            else:  # a part of a larger array
                _held(array)[...] = value


def _held(array: DeviceArray) -> NDArray[Any]:
    """What an array of `PlainRunner` holds, without copying."""
    whole: NDArray[Any] = array.owner[0]
    if whole.nbytes == array.nbytes:
        return whole.reshape(array.shape)
    first = array.offset // whole.itemsize
    return whole.reshape(-1)[first : first + array.nbytes // whole.itemsize].reshape(array.shape)


def onnx_group(
    folder: Path,
    device: str = "cpu",
    *,
    prompts: Sequence[int] = (24, 900),
    new: int = 24,
    lengths: tuple[int, int] = (40, 12),
    steps: int = 4,
) -> Group:
    """The denoising loop and decoding of a bundle. Raises ImportError, BadBundleError, BadRequestError.

    prompts, lengths: token counts. Both sides run the same graphs, so their outputs are compared with each other.
    """
    import onnxruntime

    bundle = open_bundle(folder)
    dtype, config = bundle.manifest.dtype, bundle.manifest.model
    if dtype == "bfloat16":
        raise BadRequestError(f"{folder}: numpy has no bfloat16; expected a bundle of fp32 or fp16")
    provider = "CUDAExecutionProvider"
    if device == "cpu" or provider not in onnxruntime.get_available_providers():
        device, provider = "cpu", "CPUExecutionProvider"
    # The side of a trained sample of the small bundle.
    work = Workload(new_tokens=new, height=96, width=96, steps=steps)
    plain = CompiledBackend(PlainRunner(bundle, provider), bundle.manifest)
    both = [Stages(backend, work) for backend in (load_onnx(bundle, device), plain)]
    draw, width = np.random.default_rng(0), config.decoder.stack.hidden_size
    conditions = [draw.standard_normal((1, n, width), np.float32) for n in lengths]
    loops = [partial(s.paint, s.prefixes([s.backend.put(c, dtype) for c in conditions])) for s in both]
    exact, found = (np.asarray(paint(), np.float64) for paint in loops)
    first, second = (timed(paint, steps) for paint in loops)
    pairs, same = [Pair("guided step", first, second)], True
    for count in (min(n, config.language.max_positions - new) for n in prompts):
        ours, theirs = (replace(s, work=replace(work, prompt_tokens=count)).write for s in both)
        same = same and ours() == theirs()
        samples = after_first(ours, new - 1), after_first(theirs, new - 1)
        pairs.append(Pair(f"decoded token after {count}", *samples, rate="tokens/s"))
    threads = os.environ.get("OMP_NUM_THREADS") or "one for each core"
    return Group(
        peer=f"onnxruntime {onnxruntime.__version__}",
        match=Match(
            error=float(np.linalg.norm(found - exact) / np.linalg.norm(exact)),
            bound=BOUNDS[dtype],
            tokens_equal=same if dtype == "float32" else None,
            exact=dtype == "float32",
        ),
        pairs=pairs,
        note=f"{folder.name} on {device}; the same graphs: ours with IOBinding (threads: {threads}), the peer with "
        f"session.run, numpy arrays and default options (its log silenced), in our loop. 96x96, {steps} steps; "
        f"{new} tokens written. The peer copies the whole cache for each token",
    )
