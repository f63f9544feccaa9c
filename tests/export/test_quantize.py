"""Rounded weights: against numpy's own arithmetic, and whole bundles against the float32 reference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import PARITY
from onnx import numpy_helper

from mindomni_rt import BadRequestError
from mindomni_rt.bundle.manifest import read_manifest
from mindomni_rt.export.prompts import DEFAULT_PROMPTS, read_prompts
from mindomni_rt.export.verify import BOUNDS, table, verify


def tensors(bundle: Path, graph: str) -> dict[str, np.ndarray]:
    model = onnx.load(str(bundle / f"{graph}.onnx"))
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


@pytest.mark.parametrize("precision", ["int8wo", "int4", "int8"])
def test_stages_stay_within_their_bounds(bundles: Callable[[str], Path], precision: str) -> None:
    rows = verify(bundles(precision), PARITY)
    assert {r.stage for r in rows} == {"vision", "language", "connector", "prefix", "denoiser", "vae"}
    assert all(r.passed for r in rows), table(rows)
    errors = {r.stage: r.error for r in rows if r.output in ("hidden", "velocity 1")}
    # Rounded, and not by accident exact: the nodes are there and they are read.
    assert all(error is not None and error > 1e-3 for error in errors.values()), errors
    assert {r.precision for r in rows if r.stage in ("language", "prefix", "denoiser")} == {precision}
    assert BOUNDS["fp32"] < BOUNDS["int8wo"] < BOUNDS["int4"]


def test_int8_weights_are_rounded_to_nearest_by_channel(bundles: Callable[[str], Path]) -> None:
    whole, rounded = tensors(bundles("fp32"), "denoiser"), tensors(bundles("int8"), "denoiser")
    names = [n for n in rounded if n.endswith(".int8")]
    assert len(names) == 3 * 4  # layers, times qkv, o, gate-up, down
    for name in names:
        weight = whole[name.removesuffix(".int8")]
        scale = np.abs(weight).max(axis=0) / 127
        np.testing.assert_allclose(rounded[name.replace(".int8", ".scale")], scale, rtol=1e-6)
        assert (np.abs(rounded[name] * scale - weight).max(axis=0) <= scale * 0.5005).all()
        assert np.abs(rounded[name]).max() == 127


def test_int4_groups_hold_their_own_scale(bundles: Callable[[str], Path]) -> None:
    whole, rounded = tensors(bundles("fp32"), "language"), tensors(bundles("int4"), "language")
    names = [n for n in rounded if n.endswith(".int4")]
    assert names
    for name in names:
        weight, scale = whole[name.removesuffix(".int4")], rounded[name.replace(".int4", ".scale")]
        groups = weight.T.reshape(*scale.shape, -1)  # an output channel a row, as MatMulNBits reads them
        np.testing.assert_allclose(scale, np.abs(groups).max(axis=2) / 7, rtol=1e-6)
        numbers = np.stack([rounded[name] & 15, rounded[name] >> 4], axis=-1)
        values = numbers.reshape(groups.shape).astype(np.float32) - 8
        assert (np.abs(values * scale[..., None] - groups) <= scale[..., None] * 0.5001).all()


def test_what_is_small_or_sensitive_is_kept(bundles: Callable[[str], Path]) -> None:
    for graph in ("prefix", "denoiser", "language"):
        names = [n for n in tensors(bundles("int8wo"), graph) if n.endswith(".int8")]
        assert not [n for n in names if any(part in n for part in ("embed", "norm", "final_layer", "time_token"))]
    assert any("lm_head" in n for n in tensors(bundles("int4"), "language"))


def test_the_report_tells_size_and_error(bundles: Callable[[str], Path]) -> None:
    small, large = read_manifest(bundles("int4")), read_manifest(bundles("fp32"))
    assert small.graphs["language"].report["bytes"] < large.graphs["language"].report["bytes"]
    error = small.graphs["denoiser"].report["weight_error"]
    assert 0.05 < error < 0.2  # 4 bits round a normal distribution to about a tenth


def test_prompts_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("# calibration\n\na cat\n  two dogs  \n", encoding="utf-8")
    assert read_prompts(path) == ["a cat", "two dogs"] and DEFAULT_PROMPTS
    path.write_text("# nothing\n", encoding="utf-8")
    with pytest.raises(BadRequestError, match="no prompt in it"):
        read_prompts(path)
    with pytest.raises(BadRequestError, match="calibration prompts"):
        read_prompts(tmp_path / "absent.txt")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadRequestError, match="calibration prompts"):
        read_prompts(path)
