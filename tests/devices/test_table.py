"""The table of devices: names as people and drivers write them, figures against the makers' sheets."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mindomni_rt.benchmarks.cli import main as benchmarks
from mindomni_rt.devices.table import Device, Sheet, find_device, load_devices, with_figures
from mindomni_rt.errors import BadRequestError, UnsupportedDeviceError
from mindomni_rt.export.cli import main as export
from mindomni_rt.export.targets import ARCHITECTURES


@pytest.mark.parametrize(
    ("written", "key"),
    [
        ("RTX 4090", "rtx4090"), ("4090", "rtx4090"), ("rtx4090", "rtx4090"), ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("orin", "agx-orin"), ("Jetson AGX Orin", "agx-orin"), ("Jetson AGX Orin 64GB", "agx-orin"),
        ("Orin NX 16 GB", "orin-nx"), ("Jetson Orin Nano Super", "orin-nano"), ("thor", "thor"), ("agx-thor", "thor"),
        ("NVIDIA Thor", "thor"), ("gh200", "gh200"), ("NVIDIA GH200 480GB", "gh200"), ("H100 SXM", "h100"),
        ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H100 PCIe", "h100-pcie"), ("NVIDIA A100-SXM4-80GB", "a100"),
        ("5090", "rtx5090"), ("RTX 5060 Ti 16 GB", "rtx5060ti"), ("GB10", "dgx-spark"), ("DGX Spark", "dgx-spark"),
        ("Tesla T4", "t4"), ("A6000", "rtx-a6000"), ("RTX PRO 6000", "rtx-pro-6000"),
    ],
)  # fmt: skip
def test_names(written: str, key: str) -> None:
    assert find_device(written).key == key == find_device(key.upper()).key


@pytest.mark.parametrize(
    ("written", "nearest"),
    [
        ("RTX 4090 Laptop", "rtx4090"),
        ("H100 NVL", "h100"),
        ("A100 40GB", "a100"),
        ("5070 ti", "rtx5070"),
        ("toaster", ""),
    ],
)
def test_another_product_is_not_taken_for_it(written: str, nearest: str) -> None:
    """A laptop's chip of the same number is a smaller one; 40 GB are not 80."""
    with pytest.raises(UnsupportedDeviceError, match="the nearest are") as raised:
        find_device(written)
    assert str(raised.value).count(", ") == 2 and nearest in str(raised.value)


def test_two_devices_of_one_name_are_refused() -> None:
    one, other = (Device(key=k, name="RTX 1", memory=1, source="x") for k in ("a", "b"))
    with pytest.raises(BadRequestError, match="both called"):
        Sheet({"a": one, "b": other}, {}).named("RTX 1")


def test_figures() -> None:
    """NVIDIA's sheets: memory in GiB, GB/s, dense TFLOP/s."""
    sheet = load_devices()
    assert find_device("RTX 4060").bytes == 8 * 2**30
    for name, memory, bandwidth, bf16 in (("h100", 80, 3350, 989), ("a100", 80, 2039, 312), ("4090", 24, 1008, 165.2)):
        device = find_device(name)
        assert (device.memory, device.bandwidth, device.peak["bf16"]) == (memory, bandwidth, bf16)
    for device in sheet.devices.values():
        assert device.sm in ARCHITECTURES, device.key
        assert device.sustained <= device.bandwidth or not device.sustained
        assert ("fp8" not in device.peak) or int(device.sm[3:]) >= 89
        assert not device.peak or "bf16" in device.peak


def test_what_is_not_known_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    keys = {d.key for d in with_figures(None, load_devices())}
    assert "orin-nano" not in keys and {"rtx3090", "gh200", "b200"} <= keys
    assert benchmarks(["roofline", "--device", "orin nano"]) == 2
    assert "no bandwidth and peak rates" in capsys.readouterr().err
    assert benchmarks(["roofline", "--device", "RTX 3090"]) == 0
    assert export(["plan", "--device", "Jetson AGX Orin"]) == 0
    assert export(["plan", "--device", "toaster"]) == 2


def test_reading_the_table_imports_no_torch() -> None:
    code = "import sys; import mindomni_rt.devices.table as t; t.load_devices(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
