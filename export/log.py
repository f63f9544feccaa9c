"""The log of a build, beside its bundle: NAME.build.log, or NAME.build-failed.log where a good one stands already."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from mindomni_rt.bundle.claim import Claim
from mindomni_rt.files import replace_file

_LOGGERS = ("mindomni_rt",)


class _Handler(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """Says nothing: on a full disk the build itself fails, and its error is reported once."""


@contextmanager
def build_log(bundle: Path) -> Iterator[Path]:
    """Writes all messages of a build and of TensorRT to a file, whatever the terminal shows; yields its final path.

    While the build runs the file has a name of its own, so that two builds of one bundle do not share it; the next one
    removes what a killed build left. A build that fails does not replace the log of the bundle that exists.
    """
    path = bundle.with_name(f"{bundle.name}.build.log")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        claim = Claim(path.parent, f".{path.name}.", partial(_new, path))
    except OSError as error:
        error.filename = str(bundle)
        raise
    running = claim.path
    handler = _Handler(running, mode="w", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
    try:
        yield path
    except BaseException as error:
        # To the file alone: the command prints the error once.
        handler.handle(logging.makeLogRecord({"levelname": "ERROR", "levelno": 40, "msg": f"stopped: {error!r}"}))
        if bundle.exists() and path.exists():
            path = path.with_name(f"{bundle.name}.build-failed.log")
        raise
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
        handler.close()
        try:
            replace_file(path, running.replace)
        finally:
            running.unlink(missing_ok=True)
            claim.free()


def _new(path: Path) -> str:
    """An empty file beside a log, which everyone may read."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(descriptor)
    Path(name).chmod(0o644)
    return name
