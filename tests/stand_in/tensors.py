"""What tensors do on the stand-in: FakeTensor computes shapes, this counts memory and catches the host waiting.

Values that the host asks for come from `Values`: a few small token ids in turn, zero for everything else.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .layouts import Layouts
from .runtime import CUDA, Runtime

aten = torch.ops.aten
DEVICE, READ, COPY = torch.ops.prim.device.default, aten._local_scalar_dense.default, aten.copy_.default
TO_COPY, SCALED, EMPTY_LIKE = aten._to_copy.default, aten._scaled_mm.default, aten.empty_like.default
PIN = (aten._pin_memory.default, aten.pin_memory.default)
META = 14  # torch's number of the device type
TOKENS = (40, 41, 42, 43, 44)  # repeat, so that drafts find something


class Values:
    """What a read returns: yes, zero, or the next of a few tokens; after `end` of them, if not 0, the end's token."""

    def __init__(self, end_token: int = 0, end: int = 0) -> None:
        self._tokens, self._end_token, self.end, self._told = cycle(TOKENS), end_token, end, 0

    def begin(self, end: int = 0) -> None:
        """A new request."""
        self._tokens, self.end, self._told = cycle(TOKENS), end, 0

    def of(self, tensor: Tensor) -> float | int | bool:
        if tensor.dtype == torch.bool:
            return True  # every number is finite
        if tensor.dtype.is_floating_point:
            return 0.0
        self._told += 1
        return self._end_token if self.end and self._told >= self.end else next(self._tokens)


_COMPOSITES: dict[int, bool] = {}  # by id: hashing an operation takes longer than all else here


def _composite(func: Any) -> bool:
    """Whether an operation is made of others, which must be seen one by one."""
    found = _COMPOSITES.get(id(func))
    if found is None:
        has = torch._C._dispatch_has_kernel_for_dispatch_key
        found = func.namespace == "aten" and has(func.name(), "CompositeImplicitAutograd")
        _COMPOSITES[id(func)] = found
    return found


class Operations(TorchDispatchMode):
    """Every operation on the way to FakeTensorMode."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here, and what keeps Dynamo out costs time in each operation."""
        return False

    def __init__(self, runtime: Runtime, values: Values) -> None:
        super().__init__()
        self._runtime, self._values = runtime, values
        self.layouts = Layouts()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is DEVICE and isinstance(args[0], FakeTensor):
            return args[0].fake_device
        kwargs = dict(kwargs or {})
        if func is READ:
            return self._read(args[0])
        if _composite(func):
            with self:
                found = func.decompose(*args, **kwargs)
            if found is not NotImplemented:
                return found
        pinned = kwargs.pop("pin_memory", None)
        if func is SCALED:
            self._scaled_product(*args, **kwargs)
        self._copies(func, args, kwargs)
        if func in PIN:
            found, pinned = torch.empty_like(args[0]), True
        else:
            done = self._moved(args[0], kwargs) if func is TO_COPY else None
            found = func(*args, **kwargs) if done is None else done
            found = self.layouts.after(func, args, found, self._runtime.stand.phase)
        self._account(found, bool(pinned))
        return found

    @staticmethod
    def _moved(tensor: Tensor, options: dict[str, Any]) -> Tensor | None:
        """The result of `_to_copy`, which FakeTensor takes apart, as one empty tensor. None where that is not all."""
        device = options.get("device")
        if getattr(tensor, "constant", None) is not None or (
            device is not None and torch.device(device).type == "meta"
        ):
            return None
        found: Tensor = EMPTY_LIKE(tensor, **{name: value for name, value in options.items() if name != "non_blocking"})
        return found

    def _read(self, tensor: Tensor) -> Any:
        if tensor.is_cuda:
            self._runtime.wait("item")
        elif getattr(tensor, "constant", None) is not None:
            return tensor.constant.item()
        return self._values.of(tensor)

    def _scaled_product(
        self, a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, *rest: Any, out_dtype: Any = None, **_: Any
    ) -> None:
        """What `_scaled_mm` with a scale a row asks for; FakeTensor does not know."""
        out = out_dtype or (rest[2] if len(rest) > 2 else None)
        rowwise = scale_a.numel() > 1 or scale_b.numel() > 1
        if rowwise and self._runtime.stand.capability != (9, 0) and out is not torch.bfloat16:
            raise RuntimeError("Only bf16 high precision output types are supported for row-wise scaling.")

    def _copies(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Copies between host and device, and whether the host waits for them."""
        if func is COPY:
            to, source = args[0], args[1]
            if isinstance(source, Tensor) and source.is_cuda != to.is_cuda:
                self._crossing(source, to.is_cuda, args[2] if len(args) > 2 else kwargs.get("non_blocking", False), to)
        elif func is TO_COPY and kwargs.get("device") is not None:
            device = torch.device(kwargs["device"])
            if device.type == "cuda" and device.index is None:
                device = torch.device("cuda", self._runtime.device)
            if device.type in ("cpu", "cuda") and args[0].is_cuda != (device.type == "cuda"):
                self._crossing(args[0], device.type == "cuda", kwargs.get("non_blocking", False), None)

    def _crossing(self, source: Tensor, up: bool, non_blocking: bool, to: Tensor | None) -> None:
        if getattr(source, "fake_device", source.device).type == "meta":
            return
        allocator = self._runtime.allocator
        host = source if up else to
        pinned = host is not None and allocator.is_pinned(host.untyped_storage())
        if not (non_blocking and pinned):
            self._runtime.wait("upload" if up else "download")
        elif up:
            self._runtime.upload(source.nbytes)
        else:
            self._runtime.work()

    def _account(self, found: Any, pinned: bool) -> None:
        for tensor in (found,) if isinstance(found, Tensor) else tree_leaves(found):
            if not isinstance(tensor, Tensor):
                continue
            device = getattr(tensor, "fake_device", tensor.device)
            if device.type == "cuda":
                self._runtime.allocator.track(tensor.untyped_storage(), device.index or 0)
                self._runtime.work()
            elif pinned and device.type == "cpu":
                self._runtime.allocator.pin(tensor.untyped_storage())


class Functions(TorchFunctionMode):
    """What a fake tensor cannot do: attention in one piece, arrays of the host, moving by `.data`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        handler = self._handlers.get(func)
        if handler is not None:
            found = handler(self, *args, **kwargs)
            if found is not NotImplemented:
                return found
        return func(*args, **kwargs)

    def __init__(self, runtime: Runtime, values: Values) -> None:
        super().__init__()
        self._runtime, self._values = runtime, values

    def _attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any
    ) -> Any:
        """One fused kernel: no scores in memory. (The library has one for every type used here.)"""
        if not query.is_cuda:
            return NotImplemented
        devices = {t.device for t in (query, key, value, attn_mask) if t is not None}
        if len(devices) > 1:
            raise RuntimeError(f"attention over tensors of {sorted(map(str, devices))}")
        if query.dtype != key.dtype or query.shape[-1] != key.shape[-1] or key.shape[-2] != value.shape[-2]:
            raise RuntimeError(f"attention of {query.shape} over {key.shape} and {value.shape}")
        if torch.backends.cuda.cudnn_sdp_enabled() and self._runtime.stand.phase != "vae":
            self._runtime.stand.plans.add((tuple(query.shape), tuple(key.shape)))
        batch, heads, rows, _ = query.shape
        return query.new_empty(batch, rows, heads, value.shape[-1]).transpose(1, 2)

    def _nearest(self, x: Tensor, size: Any = None, scale_factor: float = 1.0, mode: str = "nearest", **_: Any) -> Any:
        """One kernel for either layout; FakeTensor gathers, then lays out."""
        if not x.is_cuda or mode != "nearest" or size is not None or x.dim() != 4:
            return NotImplemented
        shape = (*x.shape[:2], *(int(side * scale_factor) for side in x.shape[2:]))
        last = x.shape[1] >= 4 and not x.is_contiguous() and x.stride(1) == 1
        layout = torch.channels_last if last else torch.contiguous_format
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)

    def _numpy(self, tensor: Tensor, *_: Any, **__: Any) -> Any:
        if not isinstance(tensor, FakeTensor):
            return NotImplemented
        if tensor.is_cuda:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
        return np.zeros(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))

    def _tolist(self, tensor: Tensor) -> Any:
        """One read, not one for each element."""
        if not isinstance(tensor, FakeTensor) or tensor.dim() != 1 or tensor.constant is not None:
            return NotImplemented
        if tensor.is_cuda:
            self._runtime.wait("item")
        return [self._values.of(tensor) for _ in range(tensor.shape[0])]

    def _set_data(self, tensor: Tensor, value: Tensor) -> Any:
        torch._C._disabled_torch_function_impl(torch.Tensor.data.__set__, (), (tensor, value))
        if isinstance(tensor, FakeTensor):
            tensor.fake_device = value.fake_device
        return None

    def _is_pinned(self, tensor: Tensor, *_: Any) -> Any:
        return self._runtime.allocator.is_pinned(tensor.untyped_storage())

    _handlers: dict[Any, Callable[..., Any]] = {
        torch.nn.functional.scaled_dot_product_attention: _attention,
        torch._C._nn.scaled_dot_product_attention: _attention,
        torch.nn.functional.interpolate: _nearest,
        Tensor.numpy: _numpy,
        Tensor.__array__: _numpy,
        Tensor.tolist: _tolist,
        Tensor.is_pinned: _is_pinned,
        Tensor.data.__set__: _set_data,  # type: ignore[attr-defined]
    }


class _Mode(FakeTensorMode):
    """Without guards of a real device, though `torch.cuda` says that there is one."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.dispatch(func, types, args, kwargs or {})

    @property
    def avoid_device_init(self) -> bool:
        return True


def _generator(device: Any = "cpu") -> torch.Generator:
    """torch.Generator("cuda"): numbers are never drawn."""
    return torch._C.Generator("cpu")


def _record_stream(tensor: Tensor, stream: Any) -> None:
    """The parser of arguments wants a stream of its own make."""
    assert tensor.is_cuda and isinstance(stream, torch.cuda.Stream)


def _apply(self: torch.nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> torch.nn.Module:
    """`Module._apply` as it is for real tensors: parameters keep their identity and take new data.

    For fake ones torch swaps whole objects, which weak references forbid.
    """
    for child in self.children() if recurse else ():
        child._apply(fn)
    for name, parameter in self._parameters.items():
        if parameter is None:
            continue
        moved = fn(parameter.detach())
        if moved.is_meta or parameter.is_meta:
            self._parameters[name] = torch.nn.Parameter(moved, requires_grad=False)
        else:
            parameter.data = moved
    for name, buffer in self._buffers.items():
        if buffer is not None:
            self._buffers[name] = fn(buffer)
    return self


@contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def without_numbers() -> Iterator[None]:
    """Parameters that wait for a checkpoint's tensors are not drawn first."""
    with ExitStack() as stack:
        for name in ("kaiming_uniform_", "uniform_", "normal_", "ones_", "zeros_"):
            stack.enter_context(patched(torch.nn.init, name, lambda tensor, *_, **__: tensor))
        yield


def _no_guard() -> None:
    """C++ asks for the device's guard (to switch devices) that a CPU build lacks: it gets that of "meta", a no-op."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 16).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    guards[CUDA] = guards[META]


class Fake:
    """`running`: everything inside is fake. `entered`: the same in another thread meanwhile."""

    def __init__(self, runtime: Runtime, values: Values) -> None:
        torch.cuda.init()
        _no_guard()
        self._runtime, self._values = runtime, values
        self._mode = _Mode(allow_non_fake_inputs=False)
        self.operations = Operations(runtime, values)

    @contextmanager
    def running(self) -> Iterator[None]:
        with (
            patched(torch.nn.Module, "_apply", _apply),
            patched(torch, "Generator", _generator),
            without_numbers(),
            patched(Tensor, "record_stream", _record_stream),
            self.entered(),
        ):
            yield

    @contextmanager
    def entered(self) -> Iterator[None]:
        with self._mode, self.operations, Functions(self._runtime, self._values):
            yield
