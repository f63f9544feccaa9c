"""Description of one kernel for ahead-of-time compilation; `aot` compiles it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TRITON_TYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One kernel at one set of constants. aligned: arguments divisible by 16, as the launcher of the module sees."""

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    warps: int
    stages: int
    aligned: frozenset[str] = frozenset()


def make_spec(
    name: str,
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    warps: int,
    stages: int,
    unaligned: Sequence[str] = (),
) -> Spec:
    """A Spec whose pointers and integers are all divisible by 16 but the named ones.

    types: Triton types of the arguments that are not integers; every other one that is no constant is an i32.
    """
    arguments = [a for a in kernel.arg_names if a not in constants]
    unknown = sorted((set(types) | set(unaligned)) - set(arguments))
    assert not unknown, f"{name}: no arguments {unknown} in {arguments}"
    full = {a: types.get(a, "i32") for a in arguments}
    aligned = frozenset(a for a, t in full.items() if (t == "i32" or t.startswith("*")) and a not in unaligned)
    return Spec(name=name, kernel=kernel, types=full, constants=constants, warps=warps, stages=stages, aligned=aligned)


def pointers(kernel: Any, dtype: str, **special: str) -> dict[str, str]:
    """Types of a kernel's `…_ptr` arguments: `dtype` for all but the named ones."""
    names = [a for a in kernel.arg_names if a.endswith("_ptr")]
    return {a: f"*{special.get(a.removesuffix('_ptr'), dtype)}" for a in names}
