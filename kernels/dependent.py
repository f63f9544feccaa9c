"""Programmatic dependent launch: a kernel of a token's chain begins while the one before it ends (Hopper and later).

What is launched so calls `begin` before it reads anything that another kernel wrote. Weights nobody writes: their first
tiles are asked into the L2 cache while the kernel still waits, which hides the ramp of each product.
"""

from __future__ import annotations

from .triton_compat import HAS_TRITON, tl, triton

FIRST_SM = 90
AHEAD = tl.constexpr(2) if HAS_TRITON else 2  # tiles that are asked for while a kernel waits: a power of two


def dependent(sm: int) -> bool:
    """Whether kernels for an SM are launched so, by the Triton in use."""
    return sm >= FIRST_SM and HAS_TRITON and hasattr(tl.extra.cuda, "gdc_wait")


def launch_options(pdl: bool) -> dict[str, bool]:
    """Options of the launch; older Tritons know no such name."""
    return {"launch_pdl": True} if pdl else {}


@triton.jit
def begin(PDL: tl.constexpr) -> None:
    """The next kernel may be placed; the one before has written everything."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def prefetch(pointers: tl.tensor) -> None:
    """Asks for the cache lines of some addresses."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers.to(tl.int64)], tl.int32, is_pure=False, pack=1
    )
