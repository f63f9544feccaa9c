"""Fixtures: the parity checkpoint (tiny, random, in the published layout) with cases of the released code's outputs."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    # Kernels run under Triton's interpreter, which has to be chosen before triton is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

PARITY = Path(__file__).parent / "fixtures" / "parity"
CASES = sorted(p.stem for p in (PARITY / "cases").glob("*.json"))


@pytest.fixture(scope="session")
def parity() -> Path:
    """The folder of the parity checkpoint."""
    return PARITY


def load_case(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A request and the arrays that the released code produced for it."""
    from safetensors.numpy import load_file

    request = json.loads((PARITY / "cases" / f"{name}.json").read_text(encoding="utf-8"))
    return request, load_file(PARITY / "cases" / f"{name}.safetensors")


def relative(a: Any, b: Any) -> float:
    """‖a − b‖ / ‖b‖ in float64."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape, (a.shape, b.shape)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.fixture(scope="session", autouse=True)
def export_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One folder for what builds keep, for all tests and the processes that they start: tracing is most of a build."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(shared / "cache")
    yield shared / "cache" / "mindomni-rt"
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture(scope="session")
def bundles(export_cache: Path) -> Callable[[str], Path]:
    """Bundles of the parity checkpoint for onnxruntime on the CPU, by precision; each is built once for all processes
    of a run, which only read it."""
    pytest.importorskip("onnxscript", reason="building graphs needs the export extra")
    from mindomni_rt.export.build import BuildRequest, build
    from mindomni_rt.export.targets import choose, parse_target

    folder, target = export_cache.parent / "bundles", parse_target("cpu")
    folder.mkdir(parents=True, exist_ok=True)

    @cache
    def bundle(precision: str) -> Path:
        out = folder / precision
        choice = choose(target, precision, {"vae": precision} if precision in ("fp32", "fp16") else None)
        request = BuildRequest(
            checkpoint=PARITY, out=out, target=target, choice=choice, calibration_size=64, cache=export_cache
        )
        with (folder / f"{precision}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not out.exists():
                build(request)
        return out

    return bundle


@pytest.fixture(scope="session")
def divided(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small bundle with its language model in three parts, as builds divide large ones."""
    pytest.importorskip("onnx", reason="dividing graphs needs the export extra")
    from mindomni_rt.bundle.reseal import reseal
    from mindomni_rt.export.split import split

    folder = tmp_path_factory.mktemp("divided") / "bundle"
    shutil.copytree(Path(__file__).parents[1] / "assets" / "shapes-world-bundle", folder)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    parts = split(folder / "language.onnx", manifest["model"]["language"]["stack"]["num_layers"], 3, like="hidden")
    manifest["graphs"]["language"]["parts"] = [part.name for part in parts]
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    reseal(folder)
    return folder
