"""The memory planner: its sums, its refusals, and its peaks against measured ones."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mindomni_rt.checkpoint.config import published
from mindomni_rt.errors import BadRequestError, OutOfMemoryError
from mindomni_rt.memory.footprint import Precision, stage_memory, weight_bytes
from mindomni_rt.memory.layers import Workload
from mindomni_rt.memory.planner import parse_bytes, plan
from mindomni_rt.model.random.scaled import scaled

CONFIG = published()


def test_weights_at_full_size():
    found = weight_bytes(CONFIG, Precision())
    # 7.616 B and 0.677 B parameters in 16 bits; the VAE in 32
    assert found["language"] == pytest.approx(15.23e9, rel=1e-3)
    assert found["vision"] == pytest.approx(1.353e9, rel=1e-3)
    assert found["vae"] == pytest.approx(0.3346e9, rel=1e-3)
    small = weight_bytes(CONFIG, Precision(language="int4", head="int8", decoder="int4"))
    # body 6.525 B at 4.25 bits, head 0.545 B at 8, embedding 0.545 B at 16
    assert small["language"] == pytest.approx(3.466e9 + 0.545e9 + 1.09e9, rel=1e-3)


@pytest.mark.parametrize("budget", ["80GB", "32GB", "24GB", "16GB", "12GB", "8GB", "6GB"])
def test_a_plan_keeps_its_budget(budget):
    found = plan(CONFIG, budget=parse_bytes(budget), reserve=10**8)
    assert found.peak <= parse_bytes(budget)
    loaded: set[str] = set(found.resident)
    weights = weight_bytes(CONFIG, found.precision)
    from mindomni_rt.memory.layers import PART_OF

    memory = {s.stage: s for s in found.stages}
    for move in found.schedule:  # replayed: each stage finds its weights, and the peak is what is loaded
        loaded = (loaded - set(move.drop)) | set(move.load)
        assert PART_OF[move.stage] in loaded
        stage = memory[move.stage]
        assert move.peak == 10**8 + sum(weights[p] for p in loaded) + stage.state + stage.activations


def test_all_stays_when_there_is_room():
    found = plan(CONFIG)
    assert found.moved == 0 and len(found.resident) == 5
    assert plan(CONFIG, budget=parse_bytes("24GB")).moved > 0


def test_refusal_names_what_fits():
    with pytest.raises(OutOfMemoryError, match=r"language alone needs .* of the 8.00 GB .*this fits: .*int4"):
        plan(CONFIG, precision=Precision(), budget=parse_bytes("8GB"))
    with pytest.raises(OutOfMemoryError, match=r"nothing fits; the least"):
        plan(CONFIG, budget=parse_bytes("1GB"))
    with pytest.raises(OutOfMemoryError, match=r"this fits: 2304x2304"):
        plan(scaled("small"), Workload(height=3072, width=3072), budget=parse_bytes("0.8GB"))


@pytest.mark.parametrize("text", ["", "8 XB", "-1GB", "0", "GB"])
def test_sizes_that_are_none(text):
    with pytest.raises(BadRequestError, match="8GB"):
        parse_bytes(text)
    assert parse_bytes("7.5GiB") == 7.5 * 2**30 and parse_bytes(800) == 800


CHECKS = [
    ("tiny", Workload(prompt_tokens=400, new_tokens=3, height=384, width=384, steps=2, patches=(16, 16))),
    ("small", Workload(prompt_tokens=300, new_tokens=2, negative_tokens=50, height=512, width=512, steps=1)),
    ("small", Workload(prompt_tokens=900, new_tokens=0, height=128, width=128, steps=8, guidance=False)),
]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory by stage needs Linux's /proc")
@pytest.mark.parametrize(("size", "work"), CHECKS, ids=["image", "large", "long"])
def test_peak_within_a_tenth_of_the_measured_one(size, work):
    pytest.importorskip("torch")
    from peaks import measure

    config, precision = scaled(size), Precision.uniform("float32")
    measured = measure(config, work)
    planned = plan(config, work, precision=precision)
    peak = max(measured.values())
    assert planned.peak == pytest.approx(peak, rel=0.10)
    # The part that is not weights, at its largest stage: held to a quarter, for allocators round and keep.
    extra = max(s.state + s.activations for s in stage_memory(config, work, precision))
    assert extra == pytest.approx(peak - measured["weights"], rel=0.25)


def test_importing_the_planner_needs_no_torch():
    import subprocess

    code = "import sys, mindomni_rt.memory.planner; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
