"""Which TensorRT: two packages with one API, imported when needed."""

from __future__ import annotations

import importlib
import logging
from typing import Any

from ...errors import MissingExtraError

logger = logging.getLogger(__name__)
_ORIGIN: dict[str, str | None] = {
    "tensorrt_rtx": None,  # the extra installs it
    "tensorrt": "it comes from NVIDIA, not from PyPI: on a PC or server as its installation guide says, on a "
    "Jetson with JetPack 7.2 or newer (package python3-libnvinfer)",
}


def import_tensorrt(runtime: str) -> Any:
    """The module `tensorrt_rtx` (RTX cards, DGX Spark) or `tensorrt` (Jetson, data-centre GPUs).

    Raises MissingExtraError naming the package and where it comes from.
    """
    assert runtime in _ORIGIN, runtime
    try:
        return importlib.import_module(runtime)
    except ImportError as error:
        raise MissingExtraError(runtime, "trt", _ORIGIN[runtime]) from error


def make_logger(trt: Any, errors: list[str] | None = None) -> Any:
    """An ILogger that forwards to `logging` and keeps error messages for the exception that will follow."""
    levels = {
        trt.ILogger.Severity.INTERNAL_ERROR: logging.ERROR,
        trt.ILogger.Severity.ERROR: logging.ERROR,
        trt.ILogger.Severity.WARNING: logging.WARNING,
        trt.ILogger.Severity.INFO: logging.DEBUG,  # a build logs hundreds of these
        trt.ILogger.Severity.VERBOSE: 5,
    }

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            level = levels.get(severity, logging.DEBUG)
            if "has Int64 binding" in message:
                level = logging.DEBUG  # our contracts mean it
            if level >= logging.ERROR and errors is not None:
                errors.append(message)
                level = logging.DEBUG  # the exception will say it
            logger.log(level, "%s: %s", trt.__name__, message)

    return Logger()
