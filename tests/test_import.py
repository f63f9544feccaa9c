"""`import mindomni_rt` is lean: no torch, no transformers."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPT = """
import sys
import mindomni_rt
import mindomni_rt.pipeline, mindomni_rt.inputs.prompts, mindomni_rt.events
print(sorted(sys.modules))
"""


def run() -> set[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True)
    return set(ast.literal_eval(done.stdout))


def test_import_is_lean() -> None:
    modules = run()
    loaded = {name.split(".")[0] for name in modules}
    heavy = {"torch", "transformers", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx", "triton", "safetensors"}
    heavy |= {"jinja2", "huggingface_hub", "diffusers", "matplotlib", "tqdm"}
    assert not loaded & heavy
    assert not modules & {f"mindomni_rt.{name}" for name in ("export", "kernels", "training", "benchmarks", "serving")}
    assert "mindomni_rt" in loaded and "numpy" in loaded  # the list is of that process


def test_every_public_name_exists() -> None:
    import mindomni_rt

    for name in mindomni_rt.__all__:
        assert getattr(mindomni_rt, name) is not None
    assert not hasattr(mindomni_rt, "nonsense")


def test_a_picture_needs_no_compiler() -> None:
    """`torch._dynamo` takes longer to import than a small model to load; no part of a request uses it."""
    script = (
        "import sys, mindomni_rt\n"
        f"pipe = mindomni_rt.load({str(ROOT / 'tests/fixtures/parity')!r}, device='cpu', fast=sys.argv[1] == 'fast')\n"
        "pipe.generate('two cats', height=32, width=32, num_inference_steps=2, max_new_tokens=4)\n"
        "assert 'torch' in sys.modules\n"
        "print('torch._dynamo' in sys.modules)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for path in ("reference", "fast"):
        told = subprocess.run([sys.executable, "-c", script, path], env=environment, capture_output=True, text=True)
        assert told.stdout == "False\n", told.stderr
