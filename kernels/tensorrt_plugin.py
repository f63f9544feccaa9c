"""Registers `mindomni::SegmentAttention` with TensorRT's `tensorrt.plugin`, ahead of time.

The engine then carries the kernel image and launches it itself: no Python at run time. For `tensorrt` (Jetson, data
centre); TensorRT-RTX has no such interface and uses its own fused attention. Written against the documented interface
of TensorRT 10.8 and later; **never executed**: where this was written there was neither that wheel nor a GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from .expressions import Expr, build
from .onnx_function import DOMAIN, NAME
from .plugin import INPUTS, Image, image

logger = logging.getLogger(__name__)
PLUGIN = f"{DOMAIN}::{NAME}"


def register(trt: Any, trtp: Any, sm: int, head_dim: int, heads: int, kv_heads: int) -> None:
    """Makes the plugin known to this process. trt, trtp: the modules `tensorrt` and `tensorrt.plugin`.

    A process builds engines for one SM: the image is compiled for it. Raises ValueError for shapes without a kernel.
    """

    @trtp.register(PLUGIN)
    def describe(
        q: trtp.TensorDesc,
        condition_k: trtp.TensorDesc,
        condition_v: trtp.TensorDesc,
        time_k: trtp.TensorDesc,
        time_v: trtp.TensorDesc,
        image_k: trtp.TensorDesc,
        image_v: trtp.TensorDesc,
    ) -> tuple[trtp.TensorDesc]:
        out = trtp.from_shape_expr((q.shape_expr[0], q.shape_expr[2], heads * head_dim), dtype=q.dtype)
        return (out,)

    @trtp.autotune(PLUGIN)
    def formats(
        q: trtp.TensorDesc,
        condition_k: trtp.TensorDesc,
        condition_v: trtp.TensorDesc,
        time_k: trtp.TensorDesc,
        time_v: trtp.TensorDesc,
        image_k: trtp.TensorDesc,
        image_v: trtp.TensorDesc,
        outputs: tuple[trtp.TensorDesc],
    ) -> list[Any]:
        """One type for all, 16 bits, contiguous."""
        kinds = "FP16" if sm < 80 else "FP16|BF16"
        return [trtp.AutoTuneCombination(", ".join([kinds] * (len(INPUTS) + 1)), "LINEAR")]

    @trtp.aot_impl(PLUGIN)
    def implement(
        q: trtp.TensorDesc,
        condition_k: trtp.TensorDesc,
        condition_v: trtp.TensorDesc,
        time_k: trtp.TensorDesc,
        time_v: trtp.TensorDesc,
        image_k: trtp.TensorDesc,
        image_v: trtp.TensorDesc,
        outputs: tuple[trtp.TensorDesc],
        tactic: int,
    ) -> tuple[str, str, Any, Any]:
        dtype = "bf16" if q.dtype == trt.bfloat16 else "fp16"
        made = image(sm, dtype, head_dim, heads, kv_heads)
        logger.info(
            "%s for SM %d: %d bytes of shared memory; this path has not been executed yet", PLUGIN, sm, made.shared
        )
        named = dict(zip(INPUTS, (q, condition_k, condition_v, time_k, time_v, image_k, image_v), strict=True))
        return launch(trtp, made, named)


def launch(trtp: Any, made: Image, inputs: dict[str, Any]) -> tuple[str, str, Any, Any]:
    """What `aot_impl` returns: entry, PTX, launch parameters, integer arguments, as TensorRT's symbolic numbers."""

    def symbol(expression: Expr) -> Any:
        return build(expression, lambda name, axis: inputs[name].shape_expr[axis], trtp.cdiv)

    parameters = trtp.KernelLaunchParams()
    parameters.grid_x, parameters.grid_y = symbol(made.grid_x), symbol(made.grid_y)
    parameters.block_x = made.threads
    parameters.shared_mem = made.shared
    extra = trtp.SymIntExprs(len(made.extra))
    values: Sequence[tuple[str, Expr]] = made.extra
    for index, (_, value) in enumerate(values):
        extra[index] = trtp.SymInt32(symbol(value))
    return made.entry, made.ptx, parameters, extra
