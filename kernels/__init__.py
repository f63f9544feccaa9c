"""Triton kernels of the torch backend. Each file holds one kernel, its plain-PyTorch meaning and its launch table.

Every public function takes `impl`: "triton", "torch" (the meaning) or "auto" (Triton on CUDA, the meaning elsewhere).
Without triton installed the modules import and their plain meanings run.
"""

MODULES = (
    "segment_attention",
    "decode_attention",
    "norms",
    "rope",
    "swiglu",
    "quantize",
    "linear8",
    "int4_linear",
    "gemv",
    "int8_attention",
)
"""Modules with a `specs(sm, dtype)` generator of what is compiled ahead of time."""
