"""Which of onnxruntime's execution providers serves a device, and what is wrong where none does.

Two packages install the same module: `onnxruntime` (extra `onnx`) and `onnxruntime-gpu` (extra `onnx-gpu`). Where both
are installed, the files of one overwrite those of the other and CUDA may be gone without a word.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from ...errors import BadRequestError, MissingExtraError, UnsupportedDeviceError
from ...extras import install

logger = logging.getLogger(__name__)
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
PACKAGES = ("onnxruntime", "onnxruntime-gpu")
BOTH = (
    "onnxruntime and onnxruntime-gpu are both installed and overwrite each other: pip uninstall onnxruntime "
    "onnxruntime-gpu, then install one of them (extra onnx for the CPU, onnx-gpu for CUDA)"
)


def installed() -> dict[str, str]:
    """Versions of the onnxruntime packages that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def choose_device(device: str, offered: Sequence[str]) -> tuple[str, int]:
    """("cpu" or "cuda", index) for "auto", "cpu", "cuda" or "cuda:N" and the providers that onnxruntime offers.

    "auto" is CUDA where it is offered, else the CPU. Raises BadRequestError, and UnsupportedDeviceError that names the
    extra; it never takes another device than the one asked for.
    """
    packages = installed()
    if len(packages) > 1:
        logger.warning("%s", BOTH)
    if device == "auto":
        device = "cuda" if PROVIDERS["cuda"] in offered else "cpu"
    kind, colon, index = device.partition(":")
    if kind not in PROVIDERS or (colon and not (kind == "cuda" and index.isdecimal())):
        raise BadRequestError(f"device {device!r}: the onnx backend runs on cpu, cuda or cuda:N")
    if PROVIDERS[kind] not in offered:
        advice = BOTH if len(packages) > 1 else f"pip uninstall onnxruntime, then {install('onnx-gpu')}"
        raise UnsupportedDeviceError(
            f"device {device!r}: this onnxruntime offers {', '.join(offered) or 'no provider'}. "
            f"{advice}; or use device='cpu'"
        )
    logger.info("onnxruntime offers %s; device %s uses %s", ", ".join(offered), device, PROVIDERS[kind])
    return kind, int(index or 0)


def resolve_device(device: str) -> str:
    """`choose_device` by the onnxruntime that is installed: "cpu" or "cuda:N". Raises MissingExtraError too."""
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("onnxruntime", "onnx") from error
    kind, index = choose_device(device, onnxruntime.get_available_providers())
    return kind if kind == "cpu" else f"{kind}:{index}"


def session_providers(kind: str, index: int) -> list[str | tuple[str, dict[str, int]]]:
    """The providers of a session. On CUDA float32 is float32: onnxruntime would round operands to 10 bits (TF32)."""
    if kind == "cpu":
        return [PROVIDERS["cpu"]]
    return [(PROVIDERS["cuda"], {"device_id": index, "use_tf32": 0}), PROVIDERS["cpu"]]


def check_session(graph: str, kind: str, used: Sequence[str]) -> None:
    """Raises UnsupportedDeviceError where a session left out the provider that was asked for.

    onnxruntime does so with a line on standard error when the provider's libraries (CUDA, cuDNN) cannot be loaded.
    """
    if PROVIDERS[kind] not in used:
        raise UnsupportedDeviceError(
            f"{graph}: {PROVIDERS[kind]} could not start, onnxruntime took {', '.join(used)}. Install the CUDA and "
            "cuDNN release that this onnxruntime-gpu was built for, or use device='cpu'"
        )
    logger.info("%s on %s", graph, ", ".join(used))
