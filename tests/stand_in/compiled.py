"""Registers, spills and shared memory of every launch of a request, for every SM: compiled, never run.

    PYTHONPATH=tests:. python -m stand_in.compiled [--sm 90] [--module group_norm]

Records the launches of requests at the published widths (`worker`), compiles each, and writes the table that
`test_compiled.py` holds later states against. SMs that are not named keep their part of the table, and kernels of other
modules theirs where one is named.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .runs import ROOT, Runs

TABLE = ROOT / "benchmarks" / "results" / "kernel-resources.json"
REFUSED = {75: ("linear8.linear8_kernel", "int8_attention.attend_kernel")}
"""What an SM's compiler refuses. The choice of products tries it there, logs it and takes torch's own."""
SHORT: dict[str, Any] = dict(num_inference_steps=3, max_new_tokens=6)
DRAFTS: dict[str, Any] = dict(num_inference_steps=1, height=256, width=256, end=30)
DEFAULT: list[Any] = ["default", dict(bare=True, end=6)]
"""What a user launches who sets nothing."""
REQUESTS: list[Any] = [
    # Decode attention is compiled for a range of rooms for text (512 tokens, 640 to 1024, more) and of guesses.
    ["drafts", dict(draft_tokens=4, num_inference_steps=3, max_new_tokens=30)],
    ["text and step cache", dict(step_cache=0.1, temperature=1.0, **SHORT)],
    ["condition only", dict(first_step="condition_only", num_images=2, think=False, **SHORT)],
    DEFAULT,
    ["drafts in the default room", dict(draft_tokens=4, **DRAFTS)],
    ["edit", dict(image=True, edit_features="vit+vae", cascade=True, draft_tokens=4, **DRAFTS)],
    ["most drafts", dict(draft_tokens=16, **DRAFTS)],
    ["several", dict(num_images=2, height=512, width=768, **SHORT)],
    ["large", dict(height=1536, width=2048, think=False, **SHORT)],
    # Whether counts of rows divide by 16 is part of a kernel's code.
    ["one branch", dict(guidance_scale=1.0, first_step="condition_only", draft_tokens=2, **DRAFTS)],
    ["odd sides", dict(height=448, width=560, think=False, **SHORT)],
]


def loads(sm: int) -> list[dict[str, Any]]:
    """Options of `load` whose kernels an SM may run."""
    dtype = {"dtype": "float16"} if sm < 80 else {}
    precisions = [None, "int8", "int4"] + (
        ["fp8", "fp8fast", "language=int4,decoder=fp8,attention=int8"] if sm >= 89 else []
    )
    if 80 <= sm < 89:
        precisions.append("int8,attention=int8")
    return [{"device": "cuda:0", **dtype, **({"precision": p} if p else {})} for p in precisions]


def job(sm: int, thin: str, ours: bool = True) -> dict[str, Any]:
    """What a worker is asked."""
    first, *rest = loads(sm)
    stand = {"capability": [sm // 10, sm % 10], "ours": ours}
    again = [{"load": load, "requests": REQUESTS} for load in rest]
    return {"folder": thin, "stand": stand, "load": first, "requests": REQUESTS, "again": again}


def launches(runs: Runs, sm: int) -> list[dict[str, Any]]:
    """Every launch of all precisions. Raises AssertionError when a request fails."""
    found = runs(**job(sm, runs.thin))
    for part in (found, *found["again"]):
        assert not part["load"]["error"], part["load"]["error"]
        for request in part["requests"]:
            assert not request["error"], request["error"]
    return found["launches"]


def names(launched: Iterable[dict[str, Any]]) -> set[str]:
    """Names of launches, as the table has them."""
    from .launches import Launch

    return {Launch.from_json(data).name for data in launched}


def resources(launched: Iterable[dict[str, Any]], sm: int) -> dict[str, dict[str, int]]:
    """Name of a launch -> registers, bytes spilled, bytes of shared memory. In a process without the interpreter."""
    from importlib import import_module

    from mindomni_rt.kernels.aot import compile_spec
    from mindomni_rt.kernels.spec import Spec

    from .launches import Launch

    found = {}
    for data in launched:
        launch = Launch.from_json(data)
        if launch.kernel in REFUSED.get(sm, ()):
            continue
        module, function = launch.kernel.split(".")
        spec = Spec(
            name=launch.name,
            kernel=getattr(import_module(f"mindomni_rt.kernels.{module}"), function),
            types={name: kind for name, kind in launch.types if kind != "constexpr"},
            constants=dict(launch.constants),
            warps=launch.warps,
            stages=launch.stages,
            aligned=frozenset(launch.aligned),
        )
        artifact = compile_spec(spec, sm)
        found[launch.name] = {
            "registers": artifact.registers, "spilled": artifact.spilled, "shared": artifact.shared
        }  # fmt: skip
    return dict(sorted(found.items()))


def rises(before: dict[str, dict[str, int]], now: dict[str, dict[str, int]]) -> list[str]:
    """What grew, or is new, as lines."""
    found = []
    for name, sizes in now.items():
        if name not in before:
            found.append(f"{name} is not in the table")
            continue
        for what in ("registers", "spilled", "shared"):
            if sizes[what] > before[name][what]:
                found.append(f"{name}: {what} {before[name][what]} -> {sizes[what]}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command of the module's docstring."""
    from mindomni_rt.kernels.launch import SMS

    parser = argparse.ArgumentParser(prog="python -m stand_in.compiled", description="table of registers and spills")
    parser.add_argument("--sm", type=int, nargs="+", default=list(SMS), choices=SMS)
    parser.add_argument("--out", type=Path, default=TABLE)
    parser.add_argument("--launches", type=Path, help="launches of one SM as `worker` printed them, not recorded anew")
    parser.add_argument("--module", default="", help="only kernels of this module of `kernels`")
    options = parser.parse_args(arguments)
    table = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
    given = json.loads(options.launches.read_text(encoding="utf-8")) if options.launches else None
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(Path(folder), Path(folder) / "seen")
        for sm in options.sm:
            recorded = launches(runs, sm) if given is None else given
            wanted = [it for it in recorded if not options.module or it["kernel"].startswith(f"{options.module}.")]
            kept = table.get(f"sm_{sm}", {}) if options.module else {}
            kept = {name: sizes for name, sizes in kept.items() if not name.startswith(f"{options.module}.")}
            table[f"sm_{sm}"] = dict(sorted((kept | resources(wanted, sm)).items()))
            sys.stdout.write(f"sm_{sm}: {len(table[f'sm_{sm}'])} launches\n")
            options.out.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        runs.close()
    return 0


if __name__ == "__main__":
    assert "TRITON_INTERPRET" not in os.environ, "kernels cannot be compiled under the interpreter"
    sys.exit(main())
