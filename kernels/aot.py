"""Compiles kernels for named GPUs ahead of time, on a machine that needs no GPU.

    python -m mindomni_rt.kernels.aot --sm 89 90 --out build/kernels  # .cubin, .ptx and .json of each kernel

The numbers in the JSON (shared memory, warps, registers, bytes spilled) are what a launcher and a reader need.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .launch import SHARED_LIMIT, SMS, interpreting
from .spec import TRITON_TYPES, Spec

# Triton 3.9 warns that its default will change. Contraction to FMA is what every test here was run with.
FP_FUSION = True
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
    "int8_linear",
    "norm_gemv",
    "int8_attention",
    "group_norm",
)
"""Modules with a `specs(sm, dtype)` generator of what is compiled ahead of time."""


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A compiled kernel. entry is the symbol in the cubin; shared is dynamic shared memory in bytes."""

    name: str
    sm: int
    entry: str
    shared: int
    threads: int
    registers: int
    spilled: int
    arguments: Sequence[str]
    aligned: Sequence[str]
    constants: Mapping[str, Any]
    cubin: bytes = field(repr=False)
    ptx: str = field(repr=False)

    def describe(self) -> dict[str, Any]:
        """JSON-able metadata, without the code."""
        return {k: v for k, v in asdict(self).items() if k not in ("cubin", "ptx")}


def compile_spec(spec: Spec, sm: int, ptx_version: int | None = None) -> Artifact:
    """Compiles for one SM. ptx_version: of the PTX text, as 84 for 8.4; None is the newest.

    Raises RuntimeError under the interpreter, triton's own errors for a bad kernel.
    """
    if interpreting():
        raise RuntimeError("TRITON_INTERPRET is set: kernels cannot be compiled in this process")
    names = spec.kernel.arg_names
    signature = {a: spec.types.get(a, "constexpr") for a in names}
    attributes = {(names.index(a),): [["tt.divisibility", 16]] for a in sorted(spec.aligned, key=names.index)}
    source = ASTSource(fn=spec.kernel, signature=signature, constexprs=dict(spec.constants), attrs=attributes)
    options = {"num_warps": spec.warps, "num_stages": spec.stages, "enable_fp_fusion": FP_FUSION}
    if ptx_version is not None:
        options["ptx_version"] = ptx_version
    compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    registers, spilled = resources(compiled.asm["cubin"])
    return Artifact(
        name=spec.name,
        sm=sm,
        entry=compiled.metadata.name,
        shared=compiled.metadata.shared,
        threads=32 * spec.warps,
        registers=registers,
        spilled=spilled,
        arguments=[f"{a}:{t}" for a, t in spec.types.items()],
        aligned=sorted(spec.aligned, key=names.index),
        constants=dict(spec.constants),
        cubin=compiled.asm["cubin"],
        ptx=compiled.asm["ptx"],
    )


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread and bytes of its stack (spills), by the disassembler that comes with triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.findall(r"REG:(\d+)\s+STACK:(\d+)", report)
    assert found, report
    return max(int(r) for r, _ in found), max(int(s) for _, s in found)


def all_specs(sm: int, dtype: str | None = None) -> Iterator[Spec]:
    """Every kernel at the published model's shapes, for one SM. dtype is bfloat16, on Turing float16."""
    dtype = dtype or ("float16" if sm < 80 else "bfloat16")
    for module in MODULES:
        loaded = __import__(f"{__package__}.{module}", fromlist=["specs"])
        yield from loaded.specs(sm, TRITON_TYPES[dtype])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command of the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m mindomni_rt.kernels.aot", description="compile the kernels ahead of time"
    )
    parser.add_argument("--sm", type=int, nargs="+", default=list(SMS), choices=SMS)
    parser.add_argument("--kernel", nargs="+", help="names that a kernel's name must begin with; all unless given")
    parser.add_argument("--dtype", choices=list(TRITON_TYPES), help="bfloat16 unless given (float16 on SM 75)")
    parser.add_argument("--out", type=Path, help="folder for .cubin, .ptx and .json; nothing is kept unless given")
    options = parser.parse_args(arguments)
    failed = False
    for sm in options.sm:
        for spec in all_specs(sm, options.dtype):
            if options.kernel and not spec.name.startswith(tuple(options.kernel)):
                continue
            artifact = compile_spec(spec, sm)
            too_large = artifact.shared > SHARED_LIMIT[sm]
            failed |= too_large
            sys.stdout.write(json.dumps({**artifact.describe(), "fits": not too_large}) + "\n")
            sys.stdout.flush()
            if options.out:
                save(artifact, options.out)
    return 1 if failed else 0


def save(artifact: Artifact, folder: Path) -> None:
    """Writes NAME.smNN.cubin, .ptx and .json."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"{artifact.name}.sm{artifact.sm}"
    Path(f"{stem}.cubin").write_bytes(artifact.cubin)
    Path(f"{stem}.ptx").write_text(artifact.ptx, encoding="utf-8")
    Path(f"{stem}.json").write_text(json.dumps(artifact.describe(), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    os.environ["TRITON_DEFAULT_FP_FUSION"] = str(int(FP_FUSION))
    sys.exit(main())
