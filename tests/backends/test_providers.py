"""onnxruntime's providers: named, chosen, and never exchanged for another without a word."""

from __future__ import annotations

import logging

import pytest

from mindomni_rt import BadRequestError, UnsupportedDeviceError
from mindomni_rt.backends.compiled import providers
from mindomni_rt.backends.compiled.providers import check_session, choose_device, session_providers

CPU, GPU = ["AzureExecutionProvider", "CPUExecutionProvider"], ["CUDAExecutionProvider", "CPUExecutionProvider"]


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The onnxruntime packages that seem to be installed."""
    found = {"onnxruntime": "1.24"}
    monkeypatch.setattr(providers, "installed", lambda: found)
    return found


def test_devices(packages: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert choose_device("auto", CPU) == choose_device("cpu", GPU) == ("cpu", 0)
        assert choose_device("auto", GPU) == choose_device("cuda", GPU) == ("cuda", 0)
        assert choose_device("cuda:2", GPU) == ("cuda", 2)
    assert "CUDAExecutionProvider, CPUExecutionProvider; device cuda:2 uses CUDAExecutionProvider" in caplog.text
    for device in ("tpu", "cuda:", "cuda:x", "cpu:1", ""):
        with pytest.raises(BadRequestError, match="cpu, cuda or cuda:N"):
            choose_device(device, GPU)


def test_cuda_without_its_provider_names_the_extra(packages: dict[str, str]) -> None:
    with pytest.raises(UnsupportedDeviceError, match=r"offers Azure.*CPUExec.*pip install .*onnxruntime-gpu"):
        choose_device("cuda", CPU)


def test_both_packages(packages: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    packages["onnxruntime-gpu"] = "1.24"
    assert choose_device("cpu", CPU) == ("cpu", 0)
    assert "overwrite each other" in caplog.text
    with pytest.raises(UnsupportedDeviceError, match=r"overwrite each other.*onnx-gpu"):
        choose_device("cuda", CPU)


def test_a_session_that_fell_to_the_cpu_is_an_error(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        check_session("denoiser", "cuda", GPU)
        check_session("denoiser", "cpu", CPU)
    assert "denoiser on CUDAExecutionProvider" in caplog.text
    with pytest.raises(UnsupportedDeviceError, match="denoiser: CUDAExecutionProvider could not start"):
        check_session("denoiser", "cuda", CPU)


def test_cuda_computes_float32_in_float32() -> None:
    """onnxruntime's own default, `use_tf32` = 1, rounds the operands of products and convolutions to 10 bits."""
    assert session_providers("cuda", 1) == [(GPU[0], {"device_id": 1, "use_tf32": 0}), GPU[1]]
    assert session_providers("cpu", 0) == CPU[1:]


def test_what_is_installed_here() -> None:
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    assert len(providers.installed()) == 1
