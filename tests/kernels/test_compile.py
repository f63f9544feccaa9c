"""Every kernel to machine code for every SM, in a process of its own: the interpreter is off there. No GPU needed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from kernel_checks import DEVICE

from mindomni_rt.kernels.launch import SHARED_LIMIT, SMS, TENSOR_CORES

pytestmark = pytest.mark.compile
ROOT = Path(__file__).parents[2]
# What a matrix product becomes in PTX. Thor and the data centre's Blackwell keep accumulators in tensor memory.
PRODUCT = {
    **dict.fromkeys((80, 86, 87, 89, 120, 121), "mma.sync"),
    90: "wgmma.mma_async",
    100: "tcgen05.mma",
    110: "tcgen05.mma",
}
PRODUCTS = (
    "segment_attention_96",
    "decode_attention_128",
    "linear8_int8",
    "int8_linear",
    "int4_wide",
    "int8_attention_96_16bit",
)


def compiled(sm: int, out: Path) -> dict[str, dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(out / "cache")}
    command = [sys.executable, "-m", "mindomni_rt.kernels.aot", "--sm", str(sm), "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {d["name"]: d for d in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("sm", SMS)
def test_all_kernels(sm: int, tmp_path: Path) -> None:
    from mindomni_rt.kernels.aot import MODULES

    found = compiled(sm, tmp_path)
    for module in MODULES:
        prefix = {"norms": "add_norm", "int4_linear": "int4_"}.get(module, module)
        present = any(name.startswith(prefix) for name in found)
        assert present or (sm < TENSOR_CORES and module in ("linear8", "int8_linear", "int8_attention")), module
    assert ("quantize_rows_fp8" in found) == (sm >= 89)
    if sm in (89, 90):  # sums of fp8 products leave the tensor cores, to be added in float32
        texts = [(tmp_path / f"{name}.sm{sm}.ptx").read_text() for name in ("linear8_fp8", "linear8_fp8_fast")]
        assert [len(re.findall(r"\badd(\.rn)?\.f32", text)) > 0 for text in texts] == [True, False]
    assert ("linear8_fp8_fast" in found) == (sm in (89, 90))
    for name, artifact in found.items():
        assert artifact["shared"] <= SHARED_LIMIT[sm] and artifact["fits"], name
        assert artifact["registers"] <= 255
        assert sm < TENSOR_CORES or artifact["spilled"] <= 128, (name, artifact["spilled"])
        assert (tmp_path / f"{name}.sm{sm}.cubin").read_bytes()[:4] == b"\x7fELF"
        ptx = (tmp_path / f"{name}.sm{sm}.ptx").read_text()
        assert f".target sm_{sm}" in ptx and f".entry {artifact['entry']}(" in ptx
        if name in PRODUCTS and sm >= TENSOR_CORES:
            assert PRODUCT[sm] in ptx or "mma.sync" in ptx, name
    if sm >= TENSOR_CORES:
        attention = (tmp_path / f"segment_attention_96.sm{sm}.ptx").read_text()
        assert PRODUCT[sm] in attention
        assert "bf16" in attention


def test_the_interpreter_cannot_compile() -> None:
    from mindomni_rt.kernels import segment_attention
    from mindomni_rt.kernels.aot import compile_spec

    if DEVICE == "cpu":
        with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
            compile_spec(next(segment_attention.specs(90, "bf16")), 90)
