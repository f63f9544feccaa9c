"""The error family. A message says what was wrong, what was expected, and what to do."""

from .extras import install


class MindOmniError(Exception):
    """Base of every error that a caller can act on."""


class BadRequestError(MindOmniError, ValueError):
    """A prompt, size, image or option that cannot be served."""


class BadCheckpointError(MindOmniError, ValueError):
    """A checkpoint folder or file that is missing, truncated or of another shape."""


class BadBundleError(MindOmniError, ValueError):
    """A bundle whose manifest, hash, version or files do not hold."""


class UnsupportedDeviceError(MindOmniError, RuntimeError):
    """A device, architecture or precision that this backend cannot use."""


class OutOfMemoryError(MindOmniError, MemoryError):
    """A request that does not fit the memory of the device or the given budget."""


class StorageError(MindOmniError, OSError):
    """A file that could not be written: the disk is full, or the folder is read-only."""


class GenerationCancelled(MindOmniError):
    """The caller stopped a running request: its `cancel` event is set, or its callback returned False."""


class NotFiniteError(MindOmniError, ArithmeticError):
    """A stage whose result holds NaN or infinity. The message names the stage."""


class MissingExtraError(MindOmniError, ImportError):
    """An optional dependency that is not installed. The message names the packages to install."""

    def __init__(self, package: str, extra: str, advice: str | None = None) -> None:
        advice = advice or f"{install(extra)} (the extra {extra})"
        super().__init__(f"{package} is not installed: {advice}")
        self._given = (package, extra, advice)

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        """Errors cross processes; this one is made of other arguments than its message."""
        return type(self), self._given


def not_finite(stage: str, dtype: str) -> NotFiniteError:
    """The error of a stage whose result holds NaN or infinity; dtype is what it computed in."""
    return NotFiniteError(
        f"stage {stage} gave numbers that are not finite in {dtype}: its weights are damaged or too large for it. "
        "Load the model with dtype='float32', or download it again"
    )
