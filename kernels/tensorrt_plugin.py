"""Registers `mindomni::SegmentAttention` with TensorRT's `tensorrt.plugin`, ahead of time.

The engine then carries the kernel image and launches it itself: no Python at run time. For `tensorrt` (Jetson, data
centre); TensorRT-RTX has no such interface and uses its own fused attention. Registration, autotuning and the launch
data pass the checks of TensorRT 11.4's own Python code (tests/kernels/test_tensorrt_plugin.py). **No engine with this
plugin has been built or run**: that needs the TensorRT library and a GPU.

This module does without `from __future__ import annotations`: TensorRT reads the annotations as types, not as text.
"""

import logging
from collections.abc import Sequence
from typing import Any

from .expressions import Expr, build
from .node import DOMAIN, INPUTS, NAME
from .plugin import Image, image

logger = logging.getLogger(__name__)
PLUGIN = f"{DOMAIN}::{NAME}"


def register(trt: Any, trtp: Any, sm: int, head_dim: int, heads: int, kv_heads: int) -> None:
    """Makes the plugin known to this process. trt, trtp: the modules `tensorrt` and `tensorrt.plugin`.

    A process builds engines with the plugin for one SM and one size of heads, because TensorRT registers a name once.
    Raises ValueError when asked for another.
    """
    settings = (sm, head_dim, heads, kv_heads)
    known = getattr(getattr(trtp.op, DOMAIN, None), NAME, None)
    if known is not None:
        if known.register_func.settings != settings:
            raise ValueError(
                f"{PLUGIN} is registered for (SM, head size, heads, key heads) {known.register_func.settings}, not for "
                f"{settings}: build the other engine in a process of its own"
            )
        return

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

    describe.settings = settings  # type: ignore[attr-defined]

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
    ) -> list[trtp.AutoTuneCombination]:
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
    ) -> tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]:
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
