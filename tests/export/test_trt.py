"""The TensorRT backend's decisions that need no GPU; running engines is tests/gpu's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mindomni_rt
from mindomni_rt import BadBundleError, BadRequestError, MissingExtraError, UnsupportedDeviceError
from mindomni_rt.backends.compiled import trt
from mindomni_rt.backends.compiled.graph_cache import STAGED_BYTES, Action, Captures, staged
from mindomni_rt.backends.compiled.runner import DeviceArray
from mindomni_rt.backends.compiled.trt_module import import_tensorrt
from mindomni_rt.bundle.manifest import MANIFEST, read_manifest
from mindomni_rt.bundle.seal import sealed_json
from mindomni_rt.files import write_whole


def test_device_names() -> None:
    assert [trt.parse_device(d) for d in ("auto", "cuda", "cuda:0", "cuda:3")] == [0, 0, 0, 3]
    for wrong in ("cpu", "cuda:", "cuda:-1", "gpu", ""):
        with pytest.raises(BadRequestError, match="engines run on"):
            trt.parse_device(wrong)


def test_run_then_capture_then_replay() -> None:
    captures = Captures[str]()
    assert [captures.next("a"), captures.next("b")] == [Action.RUN, Action.RUN]
    assert captures.next("a") is Action.CAPTURE
    captures.put("a", "graph of a")
    assert captures.next("a") is Action.REPLAY and captures.get("a") == "graph of a"


@given(st.lists(st.integers(0, 9), max_size=200), st.integers(1, 4))
def test_captures_never_replay_what_was_not_recorded(calls: list[int], limit: int) -> None:
    captures = Captures[int](limit)
    kept: list[int] = []
    for key in calls:
        action = captures.next(key)
        assert (action is Action.REPLAY) == (key in kept)
        if action is Action.CAPTURE:
            captures.put(key, key)
            kept = [*kept, key][-limit:]
        elif action is Action.REPLAY:
            assert captures.get(key) == key
            kept = [*(k for k in kept if k != key), key]


def test_small_arrays_are_staged_and_caches_are_not() -> None:
    # At published size: time K/V of a step are 32 layers x 32 heads x 96 halves; the condition's are 300 times that.
    assert staged(32 * 32 * 96 * 2) and not staged(300 * 32 * 32 * 96 * 2)
    assert staged(STAGED_BYTES) and not staged(STAGED_BYTES + 1)


def test_kernel_cache_file_is_of_one_gpu_and_release(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = trt.runtime_cache_file("NVIDIA GeForce RTX 4090", "1.7.1")
    assert path == tmp_path / "mindomni-rt" / "kernels" / "nvidia-geforce-rtx-4090-1.7.1.bin"


def test_write_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "cache.bin"
    write_whole(path, b"first")
    with pytest.raises(TypeError):
        write_whole(path, "not bytes")  # type: ignore[arg-type]
    assert path.read_bytes() == b"first" and [p.name for p in path.parent.iterdir()] == ["cache.bin"]


def test_missing_tensorrt_names_its_source() -> None:
    try:
        import tensorrt  # noqa: F401
    except ImportError:
        with pytest.raises(MissingExtraError, match=r"(?s)tensorrt is not installed.*Jetson"):
            import_tensorrt("tensorrt")
    else:
        pytest.skip("TensorRT is installed here")


@pytest.fixture
def engines(bundles: Callable[[str], Path], tmp_path: Path) -> Path:
    """A bundle whose manifest speaks of engines for sm_89."""
    pytest.importorskip("tensorrt_rtx", reason="needs TensorRT for RTX")
    import tensorrt_rtx

    data = json.loads((bundles("fp32") / MANIFEST).read_text())
    data.update(runtime="tensorrt_rtx", runtime_version=tensorrt_rtx.__version__, targets=["sm_89"])
    (tmp_path / MANIFEST).write_text(sealed_json(data))
    return tmp_path


def test_versions_are_checked_first(engines: Path) -> None:
    data = json.loads((engines / MANIFEST).read_text())
    data["runtime_version"] = "0.9.3"
    (engines / MANIFEST).write_text(sealed_json(data))
    with pytest.raises(BadBundleError, match=r"built by tensorrt_rtx 0\.9\.3"):
        mindomni_rt.load(engines)


def test_the_gpu_is_checked_before_files_are_read(engines: Path) -> None:
    """The folder has no engine files at all: without a GPU that is not even noticed."""
    if _has_gpu():
        pytest.skip("a GPU is here")
    with pytest.raises(UnsupportedDeviceError, match="no usable NVIDIA GPU"):
        mindomni_rt.load(engines)


def test_architecture(engines: Path) -> None:
    manifest = read_manifest(engines)
    manifest.check_device("sm_89")
    with pytest.raises(UnsupportedDeviceError, match=r"built for sm_89; this GPU is sm_86.*--target sm_86"):
        manifest.check_device("sm_86")


def test_an_onnx_bundle_is_no_engine(bundles: Callable[[str], Path]) -> None:
    with pytest.raises(BadBundleError, match="not engines"):
        trt.load_tensorrt(bundles("fp32"))


def _has_gpu() -> bool:
    try:
        trt.open_gpu(0)
    except UnsupportedDeviceError:
        return False
    return True


class _TwoProfiles:
    """An engine for 1 to 64 tokens with a second profile for one."""

    num_optimization_profiles, num_io_tensors = 2, 2

    def __init__(self) -> None:
        self.made: list[_Context] = []

    def get_tensor_name(self, index: int) -> str:
        return ("ids", "fixed")[index]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (1, -1) if name == "ids" else (1,)

    def get_tensor_profile_shape(self, name: str, index: int) -> list[tuple[int, ...]]:
        assert name == "ids"
        return [(1, 1), (1, 1), (1, 1)] if index else [(1, 1), (1, 32), (1, 64)]

    def create_execution_context(self) -> _Context:
        self.made.append(_Context())
        return self.made[-1]


class _Context:
    profile = 0

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profile = profile
        return stream == 7

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        return True

    def set_tensor_address(self, name: str, pointer: int) -> None:
        pass

    def execute_async_v3(self, stream: int) -> bool:
        return True


def test_one_token_has_a_context_of_its_own() -> None:
    built, first = _TwoProfiles(), _Context()
    engine = trt._Engine(SimpleNamespace(stream=7, _errors=[]), "language", built, first, False, set())  # type: ignore[arg-type]

    def enqueue(tokens: int) -> Any:
        arrays = {"ids": DeviceArray(0, (1, tokens), "int64", None), "fixed": DeviceArray(0, (1,), "int64", None)}
        engine._enqueue(arrays, {})
        return engine._context

    assert enqueue(5) is first and first.profile == 0
    assert enqueue(1) is built.made[0] and built.made[0].profile == 1
    assert enqueue(64) is first and enqueue(1) is built.made[0] and len(built.made) == 1
