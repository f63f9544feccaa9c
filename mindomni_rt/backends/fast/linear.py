"""Linear layers of the fast path: one class for each format of weights and activations, all called alike.

`rows` is the type of activations that a layer takes: None for floats, "int8" or "fp8" for 8-bit rows, which the norm or
the gate before it writes directly. Embeddings, norms, final layer and modulation keep the compute type.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from mindomni_rt.kernels.gemv import gemv
from mindomni_rt.kernels.int4_linear import Int4Weight, int4_linear, quantize_int4
from mindomni_rt.kernels.int8_linear import int8_linear
from mindomni_rt.kernels.linear8 import linear8, quantize_weight
from mindomni_rt.kernels.quantize import Rows, quantize_rows

from ...errors import BadRequestError

QUANTIZED = ("int8", "int8wo", "fp8", "fp8fast", "int4")
STORED = ("float32", "float16", "bfloat16", *QUANTIZED)


class Linear(nn.Module):
    """x (…, K) -> (…, N). Tensors are buffers, so that a part moves between host and device as one module."""

    rows: str | None = None
    bias: Tensor | None

    def __init__(self, bias: Tensor | None, impl: str) -> None:
        super().__init__()
        self.impl = impl
        self.register_buffer("bias", bias)

    def __call__(self, x: Tensor | Rows) -> Tensor:
        return self.forward(x)

    def row_weight(self) -> Tensor | Rows | None:
        """The weight as `norm_gemv` takes it, where it can."""
        return None


class LinearDense(Linear):
    """A floating-point weight. `one_row`: what computes a single row, "cublas" or "gemv"; `tune` measures."""

    weight: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None, impl: str) -> None:
        super().__init__(bias, impl)
        self.register_buffer("weight", weight)
        self.one_row = "cublas"

    def forward(self, x: Tensor | Rows) -> Tensor:
        assert isinstance(x, Tensor)
        if self.one_row == "gemv" and x.numel() == self.weight.shape[1]:
            return gemv(x, self.weight, self.bias, impl=self.impl)
        return F.linear(x, self.weight, self.bias)

    def row_weight(self) -> Tensor | Rows | None:
        return self.weight


class LinearW8A8(Linear):
    """8-bit weights and activations: for layers that are bound by arithmetic (the decoder's). fast: as `linear8`."""

    values: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None, impl: str, kind: str, fast: bool = False) -> None:
        super().__init__(bias, impl)
        quantized = quantize_weight(weight, kind)
        self.rows, self.dtype, self.fast = kind, weight.dtype, fast
        self.how = impl  # "cublas" or "triton" once `tune` has measured
        self.register_buffer("values", quantized.values)
        self.register_buffer("scale", quantized.scale)

    def forward(self, x: Tensor | Rows) -> Tensor:
        assert isinstance(self.rows, str)
        rows = x if isinstance(x, Rows) else quantize_rows(x, self.rows, impl=self.impl)
        return linear8(rows, Rows(self.values, self.scale), self.dtype, self.bias, impl=self.how, fast=self.fast)


class LinearW8A16(Linear):
    """int8 weights, floating-point activations: for layers that are bound by reading the weight (decoding)."""

    values: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None, impl: str) -> None:
        super().__init__(bias, impl)
        quantized = quantize_weight(weight, "int8")
        self.register_buffer("values", quantized.values)
        self.register_buffer("scale", quantized.scale)

    def forward(self, x: Tensor | Rows) -> Tensor:
        assert isinstance(x, Tensor)
        return int8_linear(x, Rows(self.values, self.scale), self.bias, impl=self.impl)

    def row_weight(self) -> Tensor | Rows | None:
        return Rows(self.values, self.scale)


class LinearW4A16(Linear):
    """4-bit weights in groups, floating-point activations."""

    packed: Tensor
    scale: Tensor
    minimum: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None, impl: str) -> None:
        super().__init__(bias, impl)
        packed = quantize_int4(weight)
        for name in ("packed", "scale", "minimum"):
            self.register_buffer(name, getattr(packed, name))

    def forward(self, x: Tensor | Rows) -> Tensor:
        assert isinstance(x, Tensor)
        return int4_linear(x, Int4Weight(self.packed, self.scale, self.minimum), self.bias, impl=self.impl)


class PatchLinear(nn.Module):
    """A patch embedding as a linear product over patches: the convolution's, whose float32 cuDNN rounds to TF32.

    Holds the convolution, so that its tensors keep their names.
    """

    def __init__(self, proj: nn.Conv2d) -> None:
        super().__init__()
        self.proj = proj

    def forward(self, latents: Tensor) -> Tensor:
        """(B, 4, h, w) -> (B, N, C), rows first."""
        size = self.proj.kernel_size[0]
        patches = latents.unflatten(3, (-1, size)).unflatten(2, (-1, size)).permute(0, 2, 4, 1, 3, 5)
        return F.linear(patches.flatten(3).flatten(1, 2), self.proj.weight.flatten(1), self.proj.bias)


def make_linear(
    weight: Tensor, bias: Tensor | None, stored: str, impl: str = "auto", work: str | None = None
) -> Linear:
    """A layer whose weight (N, K) is stored as `stored`, one of STORED. Raises BadRequestError for another.

    work: a device to quantize on; the result returns to where the weight was.
    """
    if stored not in STORED:
        raise BadRequestError(f"precision {stored!r}: expected one of {', '.join(STORED)}")
    if stored not in QUANTIZED:
        return LinearDense(weight, bias, impl)
    home, weight = weight.device, weight.to(work or weight.device)
    if stored in ("int8", "fp8", "fp8fast"):
        fast = stored == "fp8fast"
        return LinearW8A8(weight, bias, impl, "fp8" if fast else stored, fast).to(home)
    return (LinearW8A16 if stored == "int8wo" else LinearW4A16)(weight, bias, impl).to(home)


def stored_bytes(linear: Linear) -> int:
    """Bytes of a layer's tensors."""
    return sum(t.numel() * t.element_size() for t in linear.buffers())
