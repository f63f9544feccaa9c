"""Triton on the stand-in: a launch is bound by Triton's own binder for the chosen GPU and recorded. Nothing runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from .runtime import Runtime

MOST_BLOCKS = (2**31 - 1, 65535, 65535)


@dataclass(frozen=True)
class Launch:
    """What decides a kernel's code. types: argument -> Triton type ("constexpr" too); aligned: those divisible by 16.
    Integers that are 1 are constants, as the binder makes them."""

    kernel: str
    types: tuple[tuple[str, str], ...]
    aligned: tuple[str, ...]
    constants: tuple[tuple[str, Any], ...]
    warps: int
    stages: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Launch:
        """Of what a worker answers; how often it was launched is left out."""
        pairs = {name: tuple(map(tuple, data[name])) for name in ("types", "constants")}
        own = {name: value for name, value in data.items() if name != "count"}
        return cls(**{**own, **pairs, "aligned": tuple(data["aligned"])})

    @property
    def name(self) -> str:
        """Kernel, constants and what is not aligned: the same in every run."""
        known = ",".join(f"{n}={v}" for n, v in self.constants)
        kinds = ",".join(t for _, t in self.types if t.startswith("*"))
        whole = [n for n, t in self.types if t.startswith(("*", "i"))]
        odd = ",".join(n for n in whole if n not in self.aligned)
        return f"{self.kernel}({known}) [{kinds}]{' unaligned ' + odd if odd else ''} w{self.warps} s{self.stages}"


class _Pointer:
    """A tensor as the binder sees it."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype = tensor.dtype
        self._at = tensor.storage_offset() * tensor.element_size()  # a storage begins at a multiple of 512

    def data_ptr(self) -> int:
        return self._at

    def ptr_range(self) -> int:
        return 0


class Recorder:
    """Stands for `JITFunction.run`. refuse: kernels by name -> "always" or "capture", where they fail."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.seen: Counter[Launch] = Counter()
        self.refuse: dict[str, str] = {}
        major, minor = runtime.stand.capability
        self._backend = make_backend(GPUTarget("cuda", 10 * major + minor, 32))
        self._binders: dict[int, Callable[..., Any]] = {}

    def run(self, kernel: JITFunction, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        runtime, name = self._runtime, f"{kernel.module.rsplit('.', 1)[-1]}.{kernel.fn.__name__}"
        self._check_devices(name, args)
        when = self.refuse.get(name)
        if when == "always" or (when == "capture" and runtime.capturing):
            runtime.invalid = runtime.capturing
            raise RuntimeError(f"{name}: out of resources (the test asked for it)")
        binder = self._binders.get(id(kernel))
        if binder is None:
            binder = create_function_from_signature(kernel.signature, kernel.params, self._backend)
            self._binders[id(kernel)] = binder
        shown = [_Pointer(a) if isinstance(a, Tensor) else a for a in args]
        bound, specialization, options = binder(*shown, debug=False, **kwargs)
        parsed, signature, constants, attributes = kernel._pack_args(
            self._backend, {"debug": False, **kwargs}, bound, specialization, options
        )
        names = kernel.arg_names
        self._check_grid(name, grid(bound) if callable(grid) else grid)
        self.seen[
            Launch(
                name,
                tuple(signature.items()),
                tuple(names[path[0]] for path, found in attributes.items() if ["tt.divisibility", 16] in found),
                tuple((names[path[0]], value) for path, value in constants.items()),
                parsed.num_warps,
                parsed.num_stages,
            )
        ] += 1
        runtime.work(1)

    def _check_devices(self, name: str, args: tuple[Any, ...]) -> None:
        for tensor in args:
            if not isinstance(tensor, Tensor):
                continue
            if not tensor.is_cuda:
                raise ValueError(f"Pointer argument cannot be accessed from Triton (cpu tensor?): {name}")
            if tensor.device.index != self._runtime.device:
                self._runtime.fail(
                    f"{name} launched on cuda:{self._runtime.device} over tensors of {tensor.device}: "
                    "CUDA error: an illegal memory access"
                )

    def _check_grid(self, name: str, grid: Any) -> None:
        for size, most in zip(grid, MOST_BLOCKS, strict=False):
            if not 0 < size <= most:
                raise RuntimeError(f"{name}: grid {grid} is outside of 1 to {MOST_BLOCKS}")


@contextmanager
def recording(recorder: Recorder) -> Iterator[Recorder]:
    """Launches go to the recorder."""
    real = JITFunction.run
    JITFunction.run = lambda self, *args, **kwargs: recorder.run(self, *args, **kwargs)  # type: ignore[method-assign]
    try:
        yield recorder
    finally:
        JITFunction.run = real  # type: ignore[method-assign]
