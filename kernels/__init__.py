"""Triton kernels of the torch backend. Each file holds one kernel, its plain-PyTorch meaning and its launch table.

Every public function takes `impl`: "triton", "torch" (the meaning) or "auto" (Triton on CUDA, the meaning elsewhere).
Importing a kernel needs triton; nothing of this package is imported before a CUDA device is in use.
"""

MODULES = ("segment_attention",)
"""Modules with a `specs(sm, dtype)` generator of what is compiled ahead of time."""
