"""Clocks, power modes and energy, from the texts that NVIDIA's tools print: scripts of their names on PATH."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mindomni_rt.benchmarks.latency.energy import Energy, describe_energy, hwmon_rails
from mindomni_rt.benchmarks.machine import (
    NONE,
    clock_state,
    commit,
    describe_machine,
    output,
    over_current,
    pinned_clocks,
    power_mode,
    throttling,
)

Tool = Callable[[str, str], None]
ORIN = """SOC family:tegra234  Machine:NVIDIA Jetson AGX Orin Developer Kit
Online CPUs: 0-7
cpu0: Online=1 Governor=schedutil MinFreq={cpu} MaxFreq=2201600 CurrentFreq=2201600 IdleStates: WFI=1 c7=1
cpu1:  Online=1 Governor=schedutil MinFreq={cpu} MaxFreq=2201600 CurrentFreq=2112000 IdleStates: WFI=1 c7=1
cpu8: Online=0 Governor=schedutil MinFreq=729600 MaxFreq=2201600 CurrentFreq=729600 IdleStates: WFI=1 c7=1
GPU MinFreq={gpu} MaxFreq=1300500000 CurrentFreq=1300500000
EMC MinFreq=204000000 MaxFreq=3199000000 CurrentFreq=3199000000 FreqOverride=1
DLA0_CORE:   Online=1 MinFreq=0 MaxFreq=1600000000 CurrentFreq=1600000000
FAN Dynamic Speed control=active hwmon2_pwm1=55
NV Power Mode: MAXN
"""


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tool:
    """Puts a shell script on PATH, which holds nothing else but the shell."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def make(name: str, script: str) -> None:
        path = folder / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    return make


def printing(text: str) -> str:
    return f"cat <<'END'\n{text}\nEND"


def test_a_jetson(tool: Tool) -> None:
    tool("nvpmodel", printing("NV Power Mode: MAXN\n0"))
    tool("jetson_clocks", printing(ORIN.format(cpu=2201600, gpu=1300500000)))
    assert power_mode() == "MAXN (0)" and describe_machine()["power mode"] == "MAXN (0)"
    assert pinned_clocks() == "pinned, GPU 1300 MHz, EMC 3199 MHz"
    assert clock_state()["jetson_clocks"].startswith("pinned")
    for cpu, gpu in ((729600, 1300500000), (2201600, 306000000)):
        tool("jetson_clocks", printing(ORIN.format(cpu=cpu, gpu=gpu)))
        assert pinned_clocks().startswith("not pinned")


def test_an_older_jetson_and_a_mode_of_several_words(tool: Tool) -> None:
    tool("nvpmodel", printing("NVPM WARN: fan mode is not set!\nNV Power Mode: MODE_15W_6CORE\n2"))
    assert power_mode() == "MODE_15W_6CORE (2)"
    tool("nvpmodel", printing("NV Power Mode: 30W"))
    assert power_mode() == "30W"
    nano = (
        "cpu{}: Online=1 Governor=schedutil MinFreq=102000 MaxFreq=1428000 CurrentFreq=1428000 IdleStates: WFI=1 c7=1"
    )
    gpu = "GPU MinFreq=76800000 MaxFreq=921600000 CurrentFreq=153600000"
    tool("jetson_clocks", printing("\n".join([*(nano.format(i) for i in range(4)), gpu])))
    assert pinned_clocks() == "not pinned, GPU 154 MHz"


def test_missing_rights_and_tools_that_hang_do_not_crash(tool: Tool) -> None:
    tool("nvpmodel", "echo 'NVPM ERROR: permission denied' >&2; exit 1")
    tool("jetson_clocks", "echo 'Error: Run this script as a root user'; exit 1")
    tool("nvidia-smi", "echo 'NVIDIA-SMI has failed'; exit 9")
    assert power_mode() == NONE and pinned_clocks() == NONE and throttling() == NONE
    assert describe_machine()["power mode"] == NONE and clock_state()["jetson_clocks"] == NONE
    tool("slow", "exec sleep 30")
    began = time.monotonic()
    assert output(["slow"], timeout=0.2) == "" and time.monotonic() - began < 20
    assert output(["no-such-tool"]) == ""
    tool("git", "exit 128")
    assert commit() == NONE


SMI = """case "$1" in
  *name,driver*) echo 'NVIDIA GeForce RTX 4090, 580.65.06, 450.00 W' ;;
  *clocks.sm*) echo '2520 MHz, 10501 MHz, 61' ;;
  *{field}*) echo '{mask}' ;;
  *) echo 'Field is not a valid field to query.'; exit 2 ;;
esac"""


def test_a_card(tool: Tool) -> None:
    tool("nvidia-smi", SMI.format(field="clocks_event_reasons.active", mask="0x0000000000000024"))
    machine = describe_machine()
    assert machine["gpu"] == "NVIDIA GeForce RTX 4090" and machine["power limit"] == "450.00 W"
    state = clock_state()
    assert state["SM clock"] == "2520 MHz" and state["temperature"] == "61"
    assert state["throttling"] == "power cap, thermal slowdown (software)"
    tool("nvidia-smi", SMI.format(field="clocks_throttle_reasons.active", mask="0x0000000000000000"))
    assert throttling() == "none"  # an older driver knows the older name only
    tool("nvidia-smi", SMI.format(field="clocks_event_reasons.active", mask="[N/A]"))
    assert throttling() == NONE


def monitor(folder: Path, **files: str) -> None:
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)


def test_rails_of_jetsons(tmp_path: Path) -> None:
    monitor(tmp_path / "hwmon0", name="nvme\n", power1_input="9000000")
    assert hwmon_rails(tmp_path) == {}
    agx = {f"in{i}_label": label for i, label in enumerate(("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"), 1)}
    agx |= {f"in{i}_input": "5000" for i in (1, 2, 3, 4)} | {f"curr{i}_input": f"{100 * i}" for i in (1, 2, 3, 4)}
    monitor(tmp_path / "hwmon1", name="ina3221\n", **agx)
    monitor(tmp_path / "hwmon2", name="ina3221\n", in2_label="VDDQ_VDD2_1V8AO", in2_input="5000", curr2_input="900")
    rails = hwmon_rails(tmp_path)
    assert {k: read() for k, read in rails.items()} == {"VDD_GPU_SOC": 0.5, "VDD_CPU_CV": 1.0, "VIN_SYS_5V0": 1.5}
    nano = {"in1_label": "VDD_IN", "in1_input": "4984", "curr1_input": "1856"}
    monitor(tmp_path / "hwmon3", name="ina3221\n", **nano)
    assert {k: read() for k, read in hwmon_rails(tmp_path).items()} == {"VDD_IN": pytest.approx(9.250304)}
    monitor(tmp_path / "hwmon4", name="soctherm_oc\n", oc1_event_cnt="0\n", oc2_event_cnt="15\n")
    assert over_current(tmp_path) == "oc1 0, oc2 15"


def test_energy_of_a_jetson(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)  # as on a board without NVML
    monitor(tmp_path / "hwmon0", name="ina238\n", power1_input="5000000", label="VIN")
    energy = Energy("cuda:0", every=0.01, idle=0.05, hwmon=tmp_path)
    with energy.over(False):
        pass
    assert energy.record() == NONE and energy.idle_watts == 5.0
    began = time.monotonic()
    with energy.over(True):
        time.sleep(0.2)
    (joules,) = energy.joules
    assert 5 * 0.2 <= joules <= 5 * (time.monotonic() - began)
    assert describe_energy(energy.record()).endswith("J (idle power 5.0 W is in it; hwmon: VIN)")
    (tmp_path / "hwmon0" / "power1_input").unlink()  # a sensor that goes away is no reason to lose a run
    with energy.over(True):
        time.sleep(0.05)
    assert energy.joules == [joules]
    with pytest.raises(KeyboardInterrupt), energy.over(True):
        raise KeyboardInterrupt
    assert len(energy.joules) == 1


NVML = """
calls = 0
def nvmlInit(): pass
def nvmlDeviceGetHandleByIndex(index): return index
def nvmlDeviceGetHandleByUUID(uuid): return uuid
def nvmlDeviceGetPowerUsage(handle): return {{3: 70500, "GPU-8a56": 80500}}.get(handle, 60500)
def nvmlDeviceGetTotalEnergyConsumption(handle):
    global calls
    if {old}: raise RuntimeError("Not Supported")
    calls += 1
    return 1000 * calls * calls
"""


@pytest.mark.parametrize("old", [False, True])
def test_energy_of_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: bool) -> None:
    """A library of NVML's name and functions: millijoules since the driver started, milliwatts now."""
    (tmp_path / "pynvml.py").write_text(NVML.format(old=old))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    energy = Energy("cuda", every=0.01, idle=0.03)
    with energy.over(True):
        time.sleep(0.05)
    assert energy.idle_watts == pytest.approx(60.5)
    if old:
        assert energy.method == "NVML, sampled power" and energy.joules[0] >= 60.5 * 0.05
    else:  # the counter was read once before: 4 J, then 9 J
        assert energy.record() == {"method": "NVML energy counter", "joules": [5.0], "idle_watts": pytest.approx(60.5)}
    sys.modules.pop("pynvml")


@pytest.mark.parametrize(("device", "watts"), [("cuda", 70.5), ("cuda:0", 70.5), ("cuda:1", 80.5), ("cuda:2", 60.5)])
def test_energy_is_of_the_gpu_that_cuda_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, watts: float
) -> None:
    """NVML counts every GPU, CUDA those of CUDA_VISIBLE_DEVICES."""
    (tmp_path / "pynvml.py").write_text(NVML.format(old=True))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-8a56,1")
    assert Energy(device, every=0.01, idle=0.03).idle_watts == pytest.approx(watts)
    sys.modules.pop("pynvml")


def test_clocks_are_of_the_gpu_that_cuda_shows(tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    """nvidia-smi counts as NVML does."""
    tool("nvidia-smi", 'while [ "$1" != "-i" ]; do shift; done; echo "card $2, 580.65.06, 450.00 W"')
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-8a56")
    assert [describe_machine(f"cuda:{index}")["gpu"] for index in (0, 1)] == ["card 3", "card GPU-8a56"]


def test_nothing_to_read() -> None:
    assert Energy("cpu").record() == NONE and describe_energy(NONE) == NONE
