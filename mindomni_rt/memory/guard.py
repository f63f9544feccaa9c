"""No bare traceback for memory that runs out: what PyTorch and Python raise becomes the named error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import OutOfMemoryError


@contextmanager
def named_memory_errors(doing: str, advice: str) -> Iterator[None]:
    """Raises OutOfMemoryError, naming what was done and what to do, for out-of-memory errors of others.

    Needs no torch: errors are recognised by name (CUDA) and by text (the CPU allocator raises a plain RuntimeError).
    """
    try:
        yield
    except OutOfMemoryError:
        raise
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or _is_torchs(error)):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise OutOfMemoryError(f"out of memory while {doing}: {reason}. {advice}") from error


def _is_torchs(error: RuntimeError) -> bool:
    cuda = type(error).__module__.startswith("torch") and type(error).__name__ == "OutOfMemoryError"
    return cuda or "can't allocate memory" in str(error) or "out of memory" in str(error)
