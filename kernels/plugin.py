"""`segment_attention` as a kernel image for engines that run without Python: PTX, and launch sizes as expressions.

The arguments are what TensorRT's ahead-of-time plugins pass: pointers of the inputs, integers, pointers of the outputs.
Tensors are contiguous, so strides follow from sizes; the scale is a constant. Image and launch data are tested here;
no engine with them has been executed yet.

Node `mindomni::SegmentAttention`: q (B, Hq, N, D); condition K and V (1, Hkv, L, D); time K and V (1, Hkv, 1, D); image
K and V (B, Hkv, N, D) -> (B, N, Hq·D), heads joined.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .aot import compile_spec
from .expressions import CeilDiv, Dim, Expr, Mul, evaluate, to_data
from .launch import Launch, for_sm, split_head
from .onnx_function import INPUTS as INPUTS
from .segment_attention import LOG2_E, segment_kernel
from .spec import Spec, make_spec
from .triton_compat import tl, triton

# A kernel may use 48 KiB without asking the driver for more, and the plugin interface has no word for asking.
SHARED = 48 << 10
# The driver that loads an engine turns the PTX into code; an old one does not know the newest version of the text.
PTX = {80: 80, 100: 86, 110: 90}
LAUNCHES = {
    80: Launch(block_m=128, block_n=64, warps=8, stages=2),
    90: Launch(block_m=64, block_n=32, warps=4, stages=2),
    120: Launch(block_m=128, block_n=64, warps=8, stages=2),
}


@triton.jit
def plugin_kernel(
    q_ptr: tl.tensor,
    ck_ptr: tl.tensor,
    cv_ptr: tl.tensor,
    tk_ptr: tl.tensor,
    tv_ptr: tl.tensor,
    ik_ptr: tl.tensor,
    iv_ptr: tl.tensor,
    batch: tl.tensor,
    queries: tl.tensor,
    length: tl.tensor,
    o_ptr: tl.tensor,
    SCALE: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    D: tl.constexpr = D0 + D1
    KV: tl.constexpr = HEADS // GROUP
    segment_kernel(
        q_ptr, ck_ptr, cv_ptr, tk_ptr, tv_ptr, ik_ptr, iv_ptr, o_ptr, q_ptr, SCALE, queries, queries, length, HEADS,
        batch, HEADS * queries * D, queries * D, D, 0, length * D, D, 0, length * D, D, 0, D, 0, D,
        KV * queries * D, queries * D, D, KV * queries * D, queries * D, D, queries * HEADS * D, D, HEADS * D,
        GROUP, True, False, D0, D1, BM, BN, UPCAST,
    )  # fmt: skip


def grid(heads: int, launch: Launch) -> tuple[Expr, Expr]:
    """Programs along x and y."""
    return CeilDiv(Dim("q", 2), launch.block_m), Mul(Dim("q", 0), heads)


EXTRA: tuple[tuple[str, Expr], ...] = (
    ("batch", Dim("q", 0)),
    ("queries", Dim("q", 2)),
    ("length", Dim("condition_k", 2)),
)
"""The integer arguments (32 bits), in order."""


@dataclass(frozen=True, kw_only=True)
class Image:
    """What an engine needs to launch the kernel: PTX text, its entry, threads, shared memory, sizes."""

    sm: int
    dtype: str
    entry: str
    ptx: str
    threads: int
    shared: int
    grid_x: Expr
    grid_y: Expr
    extra: tuple[tuple[str, Expr], ...] = EXTRA

    def describe(self) -> dict[str, Any]:
        """JSON-able launch data, without the PTX."""
        return {
            "sm": self.sm,
            "dtype": self.dtype,
            "entry": self.entry,
            "inputs": list(INPUTS),
            "block": [self.threads, 1, 1],
            "grid": [to_data(self.grid_x), to_data(self.grid_y), 1],
            "shared": self.shared,
            "extra": [{"name": name, "type": "int32", "value": to_data(value)} for name, value in self.extra],
        }


def spec(sm: int, dtype: str, head_dim: int, heads: int, kv_heads: int) -> Spec:
    """The kernel for one SM. dtype is Triton's name ("fp16", "bf16"). Raises ValueError for a head of another size."""
    d0, d1 = split_head(head_dim)
    if not d0:
        raise ValueError(f"head_dim {head_dim} is not the sum of two powers of two of 16 or more")
    launch = for_sm(LAUNCHES, sm)
    pointers = {a: f"*{dtype}" for a in plugin_kernel.arg_names if a.endswith("_ptr")}
    return make_spec(
        f"segment_attention_plugin_{head_dim}",
        plugin_kernel,
        pointers,
        dict(
            SCALE=head_dim**-0.5 * LOG2_E,
            HEADS=heads,
            GROUP=heads // kv_heads,
            D0=d0,
            D1=d1,
            BM=launch.block_m,
            BN=launch.block_n,
            UPCAST=False,
        ),
        launch.warps,
        launch.stages,
        unaligned=("batch", "queries", "length"),
    )


def image(sm: int, dtype: str, head_dim: int, heads: int, kv_heads: int) -> Image:
    """Compiles the kernel for one SM; needs no GPU. Raises ValueError, and triton's errors."""
    wanted = spec(sm, dtype, head_dim, heads, kv_heads)
    artifact = compile_spec(wanted, sm, for_sm(PTX, sm))
    if artifact.shared > SHARED:
        raise ValueError(f"{artifact.name} needs {artifact.shared} bytes of shared memory on SM {sm}; limit {SHARED}")
    x, y = grid(heads, for_sm(LAUNCHES, sm))
    return Image(
        sm=sm,
        dtype=dtype,
        entry=artifact.entry,
        ptx=strip_hidden(artifact.ptx, artifact.entry, len(artifact.arguments)),
        threads=artifact.threads,
        shared=artifact.shared,
        grid_x=x,
        grid_y=y,
    )


def strip_hidden(ptx: str, entry: str, count: int) -> str:
    """PTX whose entry has its first `count` parameters only.

    Triton appends pointers to scratch memory of its own; a launcher that does not know them would pass too few
    arguments. Raises ValueError when the kernel reads one.
    """
    found = re.search(rf"\.entry {re.escape(entry)}\((.*?)\)", ptx, re.DOTALL)
    if found is None:
        raise ValueError(f"no entry {entry} in the PTX")
    parameters = [line.strip().rstrip(",") for line in found[1].strip().splitlines()]
    hidden = parameters[count:]
    for line in hidden:
        name = line.split()[-1]
        if len(re.findall(rf"\b{re.escape(name)}\b", ptx)) != 1:
            raise ValueError(f"the kernel reads {name}, which an engine does not pass")
    kept = ",\n".join(f"\t{line}" for line in parameters[:count])
    return ptx[: found.start(1)] + "\n" + kept + "\n" + ptx[found.end(1) :]


def launch_numbers(launched: Image, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Grid and integer arguments for given shapes of the inputs."""
    return {
        "grid": (evaluate(launched.grid_x, shapes), evaluate(launched.grid_y, shapes)),
        "extra": [evaluate(value, shapes) for _, value in launched.extra],
    }
