"""A bundle of TensorRT engines: `tensorrt_rtx` on RTX cards and DGX Spark, `tensorrt` on Jetson and data-centre GPUs.

All work goes to one stream of our own. Small inputs and outputs pass through fixed staging memory (a copy on the
device), so that a step always sees the same addresses and can be replayed as a CUDA graph: TensorRT-RTX captures by
itself, for TensorRT it is done here. The KV cache is bound as input and output at once and never moves.

Nothing of the device half has run yet: this project has built engines and checked them, but owned no GPU that
TensorRT-RTX supports. `mindomni export verify BUNDLE --against CHECKPOINT` certifies it on yours.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import re
import threading
import weakref
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...bundle.contracts import STAGES, graph_specs
from ...bundle.manifest import Bundle, open_bundle, read_manifest
from ...errors import BadBundleError, BadRequestError, MissingExtraError, OutOfMemoryError, UnsupportedDeviceError
from ...files import cache_folder, read_bytes, write_whole
from .backend import CompiledBackend
from .graph_cache import Action, Captures, staged
from .runner import NUMPY, DeviceArray
from .trt_module import import_tensorrt, make_logger

logger = logging.getLogger(__name__)
_MOST_KERNELS = 2**31  # bytes
RUNTIMES = ("tensorrt_rtx", "tensorrt")


def load_tensorrt(
    bundle: str | Path | Bundle,
    device: str = "auto",
    resident: Callable[[], Collection[str]] = lambda: STAGES,
    cuda_graphs: bool = True,
) -> CompiledBackend:
    """A bundle of engines on a GPU.

    device: "auto" and "cuda" : the first GPU, "cuda:N" another; resident: called when the GPU is known to serve, gives
    the stages whose engines stay loaded, the others are released when the next stage runs. cuda_graphs False enqueues
    every step anew. The order of checks is: device name, runtime and its version, GPU and its architecture, then every
    file's hash; only then an engine is read. Raises BadRequestError, BadBundleError, UnsupportedDeviceError,
    MissingExtraError.
    """
    index = parse_device(device)
    manifest = bundle.manifest if isinstance(bundle, Bundle) else read_manifest(Path(bundle))
    if manifest.runtime not in RUNTIMES:
        where = bundle.folder if isinstance(bundle, Bundle) else bundle
        raise BadBundleError(f"{where} holds graphs for {manifest.runtime}, not engines; use backend='onnx'")
    trt = import_tensorrt(manifest.runtime)
    manifest.check_runtime(manifest.runtime, str(trt.__version__))
    gpu = open_gpu(index)
    manifest.check_device(f"sm_{gpu.arch}")
    bundle = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    return CompiledBackend(TensorRTRunner(trt, bundle, gpu, cuda_graphs), manifest, resident())


def parse_device(device: str) -> int:
    """Index of the GPU in "auto", "cuda" or "cuda:N". Raises BadRequestError."""
    if device in ("auto", "cuda"):
        return 0
    found = re.fullmatch(r"cuda:(\d+)", device)
    if found is None:
        raise BadRequestError(f"device {device!r}: engines run on 'cuda' or 'cuda:N'")
    return int(found[1])


def open_gpu(index: int) -> Any:
    """The `cuda.core` device, made current. Raises MissingExtraError, UnsupportedDeviceError."""
    try:
        from cuda.core import Device
    except ImportError as error:
        raise MissingExtraError("cuda-core", "trt") from error
    try:
        gpu = Device(index)
        gpu.set_current()
    except (RuntimeError, ValueError) as error:  # no driver, no such device
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UnsupportedDeviceError(
            f"cuda:{index}: no usable NVIDIA GPU here ({first}). Run this bundle on the machine that it was built for, "
            "or build one with --target cpu"
        ) from error
    return gpu


def runtime_cache_file(gpu_name: str, version: str) -> Path:
    """Where TensorRT-RTX's compiled kernels are kept between runs, one file for a GPU model and a release."""
    folder = cache_folder() / "kernels"
    return folder / f"{re.sub(r'[^A-Za-z0-9]+', '-', gpu_name).strip('-').lower()}-{version}.bin"


class TensorRTRunner:
    """Engines of a bundle on one GPU and one stream; each is read when first used."""

    name = "tensorrt"

    def __init__(self, trt: Any, bundle: Bundle, gpu: Any, cuda_graphs: bool = True) -> None:
        self._trt, self._bundle, self._gpu = trt, bundle, gpu
        self.device = f"cuda:{gpu.device_id}"
        self._stream = gpu.create_stream()
        self._errors: list[str] = []
        self._runtime = trt.Runtime(make_logger(trt, self._errors))
        self._specs = graph_specs(bundle.manifest.model)
        self._graphs: dict[str, _Engine] = {}
        self._cuda_graphs = cuda_graphs
        self._native = hasattr(trt, "CudaGraphStrategy")  # TensorRT-RTX captures by itself
        self._kernels = _KernelCache(trt, runtime_cache_file(gpu.name, trt.__version__)) if self._native else None
        self._threads = threading.local()
        if self._kernels is not None:
            weakref.finalize(self, self._kernels.save)

    def _enter(self) -> None:
        """CUDA knows its current device by thread; a request may come from any."""
        if not getattr(self._threads, "entered", False):
            self._gpu.set_current()
            self._threads.entered = True

    @property
    def stream(self) -> int:
        return int(self._stream.handle)

    def empty(self, shape: tuple[int, ...], dtype: str) -> DeviceArray:
        self._enter()
        array = DeviceArray(0, shape, dtype, None)
        try:
            buffer = self._gpu.allocate(max(array.nbytes, 1), stream=self._stream)
        except RuntimeError as error:
            if "OUT_OF_MEMORY" in str(error):
                raise OutOfMemoryError(
                    f"no GPU memory for an array of {shape} {dtype} ({array.nbytes / 1e6:.0f} MB). Ask for a smaller "
                    "image, or load with a memory_budget"
                ) from error
            raise
        driver = _driver()
        _check(driver.cuMemsetD8Async(int(buffer.handle), 0, array.nbytes, self.stream))
        return DeviceArray(int(buffer.handle), shape, dtype, buffer)

    def write(self, target: DeviceArray, values: NDArray[Any]) -> None:
        assert values.shape == target.shape and values.dtype == NUMPY[target.dtype], (values.shape, target.shape)
        host = np.ascontiguousarray(values)
        # From pageable memory the driver stages the copy before it returns, so `host` may go.
        _check(_driver().cuMemcpyHtoDAsync(target.pointer, host.ctypes.data, target.nbytes, self.stream))

    def get(self, array: DeviceArray) -> NDArray[Any]:
        self._enter()
        out = np.empty(array.shape, NUMPY[array.dtype])
        _check(_driver().cuMemcpyDtoHAsync(out.ctypes.data, array.pointer, array.nbytes, self.stream))
        self.synchronize()
        return out

    def run(self, graph: str, inputs: Mapping[str, DeviceArray], outputs: Mapping[str, DeviceArray]) -> None:
        self._enter()
        if graph not in self._graphs:
            self._graphs[graph] = self._open(graph)
        self._graphs[graph].run(inputs, outputs)

    def release(self, graph: str) -> None:
        self.synchronize()
        self._graphs.pop(graph, None)

    def synchronize(self) -> None:
        self._stream.sync()

    def mark(self) -> Callable[[], None]:
        wait: Callable[[], None] = self._stream.record().sync
        return wait

    def _open(self, graph: str) -> _Engine:
        path = self._bundle.path(self._bundle.manifest.graphs[graph].file)
        self._errors.clear()
        # Mapped, so that a plan of gigabytes is not held twice.
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
            engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            said = " ".join(self._errors)[:400]
            if "memory" in said.lower():
                raise OutOfMemoryError(f"{path}: no GPU memory for this engine. TensorRT: {said}")
            raise BadBundleError(
                f"{path}: {self._trt.__name__} {self._trt.__version__} refuses this engine for {self._gpu.name}: "
                f"{said or 'no reason given'}. Build the bundle again on this version"
            )
        config = None
        if self._native:
            config = engine.create_runtime_config()
            if self._cuda_graphs:
                config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            assert self._kernels is not None
            self._kernels.attach(config)
        context = engine.create_execution_context(config) if config is not None else engine.create_execution_context()
        if context is None:
            raise OutOfMemoryError(f"{path}: no execution context: {' '.join(self._errors)[:400]}")
        capture = self._cuda_graphs and not self._native
        return _Engine(self, graph, engine, context, capture, {i for pair in self._specs[graph].in_place for i in pair})


class _Engine:
    """An engine with its context, staging memory and captured graphs."""

    def __init__(
        self, runner: TensorRTRunner, name: str, engine: Any, context: Any, capture: bool, in_place: set[str]
    ) -> None:
        self._runner, self._name, self._context, self._engine = runner, name, context, engine
        self._in_place = in_place
        self._contexts = {0: context}
        self._profiles: dict[tuple[Any, ...], int] = {}
        self._names = {engine.get_tensor_name(i) for i in range(engine.num_io_tensors)}
        self._staging: dict[str, DeviceArray] = {}
        self._captures = Captures[Any]() if capture else None

    def run(self, inputs: Mapping[str, DeviceArray], outputs: Mapping[str, DeviceArray]) -> None:
        given = {n: a for n, a in inputs.items() if n in self._names}
        bound_in = {n: self._bind(n, a) for n, a in given.items()}
        bound_out = {n: self._bind(n, a) for n, a in outputs.items()}
        for name, array in given.items():
            self._copy(array, bound_in[name])
        key = tuple((n, a.pointer, a.shape) for n, a in (*bound_in.items(), *bound_out.items()))
        action = self._captures.next(key) if self._captures is not None else Action.RUN
        if action is Action.REPLAY:
            assert self._captures is not None
            self._captures.get(key).launch(self._runner._stream)
        else:
            self._enqueue(bound_in, bound_out)
            if action is Action.CAPTURE:
                self._capture(key)
        for name, array in outputs.items():
            self._copy(bound_out[name], array)

    def _bind(self, name: str, array: DeviceArray) -> DeviceArray:
        """The memory that the engine sees: staging for small arrays, the array itself for large ones and caches."""
        if name in self._in_place or not staged(array.nbytes):
            return array
        if name not in self._staging or self._staging[name].nbytes < array.nbytes:
            self._staging[name] = self._runner.empty(array.shape, array.dtype)
        place = self._staging[name]
        return DeviceArray(place.pointer, array.shape, array.dtype, place.owner)

    def _copy(self, source: DeviceArray, target: DeviceArray) -> None:
        if source.pointer != target.pointer:
            stream = self._runner.stream
            _check(_driver().cuMemcpyDtoDAsync(target.pointer, source.pointer, target.nbytes, stream))

    def _profile(self, inputs: Mapping[str, DeviceArray]) -> int:
        """The last profile that serves these shapes, 0 where none does: that of one token comes after that of all."""
        key = tuple((name, array.shape) for name, array in inputs.items())
        if key not in self._profiles:
            count = self._engine.num_optimization_profiles
            serves = (i for i in reversed(range(count)) if all(self._serves(n, shape, i) for n, shape in key))
            self._profiles[key] = 0 if count == 1 else next(serves, 0)
        return self._profiles[key]

    def _serves(self, name: str, shape: tuple[int, ...], profile: int) -> bool:
        if all(side > 0 for side in self._engine.get_tensor_shape(name)):
            return True  # a fixed shape is in no profile
        least, _, most = self._engine.get_tensor_profile_shape(name, profile)
        return all(low <= side <= high for low, side, high in zip(least, shape, most, strict=True))

    def _choose_context(self, inputs: Mapping[str, DeviceArray]) -> None:
        """A context for each profile: to change one context's profile waits for the device."""
        profile = self._profile(inputs)
        if profile not in self._contexts:
            context = self._engine.create_execution_context()
            if context is None or not context.set_optimization_profile_async(profile, self._runner.stream):
                raise OutOfMemoryError(f"{self._name}: no execution context: {' '.join(self._runner._errors)[:400]}")
            self._contexts[profile] = context
        self._context = self._contexts[profile]

    def _enqueue(self, inputs: Mapping[str, DeviceArray], outputs: Mapping[str, DeviceArray]) -> None:
        self._choose_context(inputs)
        for name, array in inputs.items():
            if not self._context.set_input_shape(name, array.shape):
                raise BadRequestError(
                    f"{self._name}: {name} of {array.shape} is outside of the sizes that this engine serves; build a "
                    "bundle with a larger profile"
                )
            self._context.set_tensor_address(name, array.pointer)
        for name, array in outputs.items():
            self._context.set_tensor_address(name, array.pointer)
        if not self._context.execute_async_v3(self._runner.stream):
            said = " ".join(self._runner._errors)[:400]
            self._runner._errors.clear()
            if "memory" in said.lower():
                raise OutOfMemoryError(f"{self._name}: {said}")
            raise RuntimeError(f"{self._name}: TensorRT did not run it: {said or 'no reason given'}")

    def _capture(self, key: Any) -> None:
        """Records the call that has just run; TensorRT wants one plain run of a shape first, and that was it."""
        assert self._captures is not None
        builder = self._runner._stream.create_graph_builder()
        builder.begin_building(mode="thread_local")
        try:
            recorded = self._context.execute_async_v3(self._runner.stream)
        finally:
            builder.end_building()
        if not recorded:
            logger.warning("%s: TensorRT cannot be captured into a CUDA graph here; every step is enqueued", self._name)
            self._captures = None
            return
        self._captures.put(key, builder.complete())


class _KernelCache:
    """TensorRT-RTX compiles kernels when an engine first runs; kept on disk, the next process starts without that."""

    def __init__(self, trt: Any, path: Path) -> None:
        self._trt, self._path, self._cache = trt, path, None

    def attach(self, config: Any) -> None:
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            with contextlib.suppress(OSError):
                # Of another driver or GPU it is refused and made again; that costs time, nothing else.
                if not self._cache.deserialize(read_bytes(self._path, _MOST_KERNELS)):  # type: ignore[attr-defined]
                    logger.info("%s does not fit this machine any more; kernels are compiled again", self._path)
        config.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Writes the cache, whole or not at all. A failure is logged: the next process compiles again."""
        if self._cache is None:
            return
        try:
            write_whole(self._path, bytes(self._cache.serialize()))
        except OSError as error:
            logger.warning("compiled kernels were not kept: %s", error)


def _driver() -> Any:
    from cuda.bindings import driver

    return driver


def _check(result: tuple[Any, ...]) -> None:
    """Raises RuntimeError for a CUDA error code."""
    if int(result[0]) != 0:
        raise RuntimeError(f"CUDA: {result[0].name}")
