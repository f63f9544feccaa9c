"""`triton` and `triton.language` where Triton is installed, stand-ins that only import where it is not.

Without Triton (a CPU build of PyTorch, Windows) the kernels' modules import and their reference implementations run.
"""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

HAS_TRITON = importlib.util.find_spec("triton") is not None

if HAS_TRITON:
    import triton
    import triton.language as tl
    from triton.errors import TritonError
else:
    triton: Any = SimpleNamespace(  # type: ignore[no-redef]
        jit=lambda function: function,
        cdiv=lambda a, b: -(-a // b),
        next_power_of_2=lambda n: 1 << max(n - 1, 0).bit_length(),
    )
    tl: Any = None  # type: ignore[no-redef]
    TritonError = RuntimeError  # type: ignore[misc,assignment]

REFUSALS: tuple[type[Exception], ...] = (RuntimeError, ValueError, TritonError)
"""What a launch raises where a kernel does not fit the device: registers, shared memory, a missing instruction."""

__all__ = ["HAS_TRITON", "REFUSALS", "tl", "triton"]
