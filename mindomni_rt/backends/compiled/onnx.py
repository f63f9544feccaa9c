"""A bundle on onnxruntime: the CPU default, and CUDA where onnxruntime-gpu is installed.

Every input and output is bound to memory that we own. A KV cache is bound at the same address as input and output, and
onnxruntime's TensorScatter then writes the new rows alone: nothing is copied per token.
"""

from __future__ import annotations

import ctypes
import logging
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
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
_TYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(bfloat16)": "bfloat16"}
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
        self._graphs: dict[str, _Graph] = {}
        self.waited: dict[str, float] = {}
        """Seconds that runs of a graph have waited for its weights."""

    def open_ahead(self, graph: str) -> None:
        """Begins to open a graph in threads, while the tokenizer is read or a user types. What goes wrong is raised by
        the first `run`.

        At the published size onnxruntime packs the language model's weights for seconds, on one core for a session. So
        a bundle has it in parts, which are opened side by side, and the first ones work while the last are opened.
        """
        entry = self._bundle.manifest.graphs[graph]
        # A GPU's runtime packs nothing, and would wait for the end of each part.
        files = (entry.parts if self._kind == "cpu" else ()) or (entry.file,)
        # Small graphs name the same data file and need little of it.
        for name in entry.data if len(files) > 1 else ():
            _read_ahead(self._bundle.path(name))
        pool = ThreadPoolExecutor(min(len(files), self._threads), thread_name_prefix=f"open-{graph}")
        self._graphs[graph] = _Graph([pool.submit(self._open, graph, file) for file in files])
        pool.shutdown(wait=False)

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
        if graph not in self._graphs or self._graphs[graph].lost:
            self.open_ahead(graph)
        try:
            waited = self._graphs[graph].run(inputs, outputs, self.empty)
            self.waited[graph] = self.waited.get(graph, 0.0) + waited
        except BadBundleError:  # it could not be opened
            self.release(graph)
            raise
        except Exception as error:  # onnxruntime's errors share no base below Exception; the message is all there is
            if "allocate" in str(error).lower() or "bad_alloc" in str(error):
                raise OutOfMemoryError(f"onnxruntime found no memory for graph {graph}: {error}") from error
            raise BadBundleError(
                f"{self._bundle.folder}: graph {graph} failed in onnxruntime: {error}. Build the bundle again"
            ) from error

    def _open(self, graph: str, file: str) -> _Session:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self._threads, 1
        options.log_severity_level = 3
        # Six sessions take turns: threads of one that waits must not spin beside those of the one that works.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        # The arena would keep each stage's peak for good.
        options.enable_cpu_mem_arena = False
        path = self._bundle.path(file)
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
        if found := self._graphs.pop(graph, None):
            found.wait()  # its memory is free when this returns

    def synchronize(self) -> None:
        """onnxruntime returns when the work is done."""

    def mark(self) -> Callable[[], None]:
        return self.synchronize


def _read_ahead(path: Path) -> None:
    """Lets the system read a file into its cache, without waiting: mapped pages alone come in small pieces."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError), path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


class _Graph:
    """The sessions of a graph, which run one after another. Any of them may still be opening."""

    def __init__(self, parts: Sequence[Future[_Session]]) -> None:
        self._parts, self._process = parts, os.getpid()
        self._passed: dict[str, DeviceArray] = {}  # from one part to the next

    @property
    def lost(self) -> bool:
        """Whether the process was forked before all was open: the threads that opened it are not in this one."""
        return os.getpid() != self._process and not all(part.done() for part in self._parts)

    def wait(self) -> None:
        """Returns when nothing is being opened."""
        if not self.lost:
            wait(self._parts)

    def run(
        self,
        inputs: Mapping[str, DeviceArray],
        outputs: Mapping[str, DeviceArray],
        empty: Callable[[tuple[int, ...], str], DeviceArray],
    ) -> float:
        """empty: makes memory for what one part passes to the next. Returns the seconds of waiting for sessions."""
        waited = 0.0
        for part in self._parts:
            began = time.perf_counter()
            session = part.result()
            waited += time.perf_counter() - began
            for name, (shape, dtype) in session.further(inputs, outputs).items():
                if name not in self._passed or self._passed[name].shape != shape:
                    self._passed[name] = empty(shape, dtype)
            session.run({**inputs, **self._passed}, {**outputs, **self._passed})
        return waited


class _Session:
    """A session and its binding; an address is bound again only when it changed."""

    def __init__(self, session: Any, kind: str, index: int) -> None:
        self._session, self._binding = session, session.io_binding()
        self._kind, self._index = kind, index
        self._bound: dict[str, tuple[int, tuple[int, ...]]] = {}
        self._inputs, self._outputs = (
            {t.name: t for t in half} for half in (session.get_inputs(), session.get_outputs())
        )

    def further(
        self, inputs: Mapping[str, DeviceArray], outputs: Mapping[str, DeviceArray]
    ) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and type of the outputs that the caller does not know: what this part passes to the next."""
        names = [name for name in self._outputs if name not in outputs]
        if not names:
            return {}
        known = [(t.shape, inputs[name].shape) for name, t in self._inputs.items() if name in inputs]
        sizes = {axis: size for axes, shape in known for axis, size in zip(axes, shape, strict=True)}
        return {
            name: (tuple(sizes.get(axis, axis) for axis in self._outputs[name].shape), _TYPES[self._outputs[name].type])
            for name in names
        }

    def run(self, inputs: Mapping[str, DeviceArray], outputs: Mapping[str, DeviceArray]) -> None:
        for bind, known, arrays in (
            (self._binding.bind_input, self._inputs, inputs),
            (self._binding.bind_output, self._outputs, outputs),
        ):
            for name in known.keys() & arrays.keys():
                array = arrays[name]
                place = (array.pointer, array.shape)
                if self._bound.get(name) != place:
                    element = _BFLOAT16 if array.dtype == "bfloat16" else NUMPY[array.dtype].type
                    bind(name, self._kind, self._index, element, array.shape, array.pointer)
                    self._bound[name] = place
        self._session.run_with_iobinding(self._binding)


def _host(array: DeviceArray) -> NDArray[Any]:
    """An array on the CPU as numpy sees it."""
    memory = (ctypes.c_byte * array.nbytes).from_address(array.pointer)
    return np.ctypeslib.as_array(memory).view(NUMPY[array.dtype]).reshape(array.shape)
