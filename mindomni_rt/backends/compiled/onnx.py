"""A bundle on onnxruntime: the CPU default, and CUDA where onnxruntime-gpu is installed.

Every input and output is bound to memory that we own. A KV cache is bound at the same address as input and output, and
onnxruntime's TensorScatter then writes the new rows alone: nothing is copied per token.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...bundle.contracts import STAGES
from ...bundle.manifest import Bundle, open_bundle
from ...errors import BadBundleError, MissingExtraError, OutOfMemoryError, UnsupportedDeviceError
from ...memory.host import cpu_threads
from .backend import CompiledBackend
from .providers import check_session, choose_device, session_providers
from .runner import NUMPY, DeviceArray

logger = logging.getLogger(__name__)
_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16; numpy has no such type


def load_onnx(
    bundle: str | Path | Bundle, device: str = "auto", threads: int | None = None, resident: Collection[str] = STAGES
) -> CompiledBackend:
    """A bundle built for onnxruntime.

    device: "auto" takes CUDA where onnxruntime offers it, else "cpu"; "cuda", "cuda:N". threads: of one operator;
    None is OMP_NUM_THREADS or the cores this process may use. resident: stages whose weights stay loaded; the others
    leave when the next stage runs. A language model that stays is opened by a thread from now on. Raises
    BadBundleError, UnsupportedDeviceError, MissingExtraError.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("onnxruntime", "onnx") from error
    bundle = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    if bundle.manifest.runtime != "onnx":
        raise BadBundleError(
            f"{bundle.folder} holds engines of {bundle.manifest.runtime}, not ONNX graphs; use backend='tensorrt'"
        )
    kind, index = choose_device(device, onnxruntime.get_available_providers())
    if kind == "cpu" and bundle.manifest.dtype == "bfloat16":
        raise UnsupportedDeviceError(
            "onnxruntime computes no bfloat16 on the CPU; build with --target cpu --precision fp32 or fp16"
        )
    runner = OnnxRunner(bundle, kind, index, threads)
    if "language" in resident:
        runner.open_ahead("language")
    return CompiledBackend(runner, bundle.manifest, resident)


class OnnxRunner:
    """Sessions of a bundle, made when first used."""

    name = "onnx"

    def __init__(self, bundle: Bundle, kind: str = "cpu", index: int = 0, threads: int | None = None) -> None:
        self.device = kind if kind == "cpu" else f"{kind}:{index}"
        self._bundle, self._kind, self._index = bundle, kind, index
        self._threads = threads or cpu_threads()
        self._sessions: dict[str, _Session] = {}
        self._opening: dict[str, Future[_Session]] = {}
        self._process = os.getpid()

    def open_ahead(self, graph: str) -> None:
        """Begins to open a graph in a thread. At the published size onnxruntime packs the language model's weights for
        seconds, on one core, while the tokenizer is read or a user types. What goes wrong is raised by the first `run`.
        """
        pool = ThreadPoolExecutor(1, thread_name_prefix=f"open-{graph}")
        self._opening[graph] = pool.submit(self._open, graph)
        pool.shutdown(wait=False)

    def _opened(self, graph: str) -> _Session | None:
        """What `open_ahead` made of a graph, after it ended; None without, or in a forked process, which lacks it."""
        opening = self._opening.pop(graph, None)
        return None if opening is None or os.getpid() != self._process else opening.result()

    def empty(self, shape: tuple[int, ...], dtype: str) -> DeviceArray:
        try:
            if self._kind == "cpu":
                host = np.zeros(shape, NUMPY[dtype])
                return DeviceArray(host.ctypes.data, shape, dtype, host)
            return self._on_device(np.zeros(shape, NUMPY[dtype]), dtype)
        except MemoryError as error:
            raise OutOfMemoryError(f"no memory for an array of {shape} {dtype}") from error

    def _on_device(self, values: NDArray[Any], dtype: str) -> DeviceArray:
        from onnxruntime import OrtValue

        value = OrtValue.ortvalue_from_numpy(values.reshape(-1).view(np.uint8), self._kind, self._index)
        return DeviceArray(value.data_ptr(), values.shape, dtype, value)

    def write(self, target: DeviceArray, values: NDArray[Any]) -> None:
        assert values.shape == target.shape and values.dtype == NUMPY[target.dtype], (values.shape, target.shape)
        if self._kind == "cpu":
            _host(target)[...] = values
        else:
            assert target.offset == 0, "onnxruntime replaces whole arrays only"
            target.owner.update_inplace(np.ascontiguousarray(values).reshape(-1).view(np.uint8))

    def get(self, array: DeviceArray) -> NDArray[Any]:
        if self._kind == "cpu":
            return _host(array).copy()
        flat = array.owner.numpy()[array.offset : array.offset + array.nbytes]
        return flat.view(NUMPY[array.dtype]).reshape(array.shape)

    def run(self, graph: str, inputs: Mapping[str, DeviceArray], outputs: Mapping[str, DeviceArray]) -> None:
        if graph not in self._sessions:
            self._sessions[graph] = self._opened(graph) or self._open(graph)
        try:
            self._sessions[graph].run(inputs, outputs)
        except Exception as error:  # onnxruntime's errors share no base below Exception; the message is all there is
            if "allocate" in str(error).lower() or "bad_alloc" in str(error):
                raise OutOfMemoryError(f"onnxruntime found no memory for graph {graph}: {error}") from error
            raise BadBundleError(
                f"{self._bundle.folder}: graph {graph} failed in onnxruntime: {error}. Build the bundle again"
            ) from error

    def _open(self, graph: str) -> _Session:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self._threads, 1
        options.log_severity_level = 3
        # Six sessions take turns: threads of one that waits must not spin beside those of the one that works.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        # The arena would keep each stage's peak for good.
        options.enable_cpu_mem_arena = False
        path = self._bundle.path(self._bundle.manifest.graphs[graph].file)
        try:
            session = onnxruntime.InferenceSession(
                str(path), options, providers=session_providers(self._kind, self._index)
            )
        except Exception as error:  # onnxruntime's errors share no base below Exception
            raise BadBundleError(f"{path}: onnxruntime {onnxruntime.__version__} refuses it: {error}") from error
        session.disable_fallback()  # an operator that fails on CUDA must not run on the CPU from then on
        check_session(graph, self._kind, session.get_providers())
        return _Session(session, self._kind, self._index)

    def release(self, graph: str) -> None:
        with suppress(BadBundleError):
            self._opened(graph)  # its memory is free when this returns
        self._sessions.pop(graph, None)

    def synchronize(self) -> None:
        """onnxruntime returns when the work is done."""

    def mark(self) -> Callable[[], None]:
        return self.synchronize


class _Session:
    """A session and its binding; an address is bound again only when it changed."""

    def __init__(self, session: Any, kind: str, index: int) -> None:
        self._session, self._binding = session, session.io_binding()
        self._kind, self._index = kind, index
        self._bound: dict[str, tuple[int, tuple[int, ...]]] = {}
        self._names = {i.name for i in session.get_inputs()} | {o.name for o in session.get_outputs()}

    def run(self, inputs: Mapping[str, DeviceArray], outputs: Mapping[str, DeviceArray]) -> None:
        for bind, arrays in ((self._binding.bind_input, inputs), (self._binding.bind_output, outputs)):
            for name, array in arrays.items():
                place = (array.pointer, array.shape)
                if name in self._names and self._bound.get(name) != place:
                    element = _BFLOAT16 if array.dtype == "bfloat16" else NUMPY[array.dtype].type
                    bind(name, self._kind, self._index, element, array.shape, array.pointer)
                    self._bound[name] = place
        self._session.run_with_iobinding(self._binding)


def _host(array: DeviceArray) -> NDArray[Any]:
    """An array on the CPU as numpy sees it."""
    memory = (ctypes.c_byte * array.nbytes).from_address(array.pointer)
    return np.ctypeslib.as_array(memory).view(NUMPY[array.dtype]).reshape(array.shape)
