"""Errors of training. Each is a MindOmniError: the command line prints it in one line."""

from __future__ import annotations

from mindomni_rt.commands import INTERRUPTED
from mindomni_rt.errors import BadRequestError, MindOmniError
from mindomni_rt.errors import StorageError as StorageError


class BadConfigError(BadRequestError):
    """A configuration file, key or value that cannot be used."""


class BadDataError(BadRequestError):
    """A data file or record that cannot be used. The message names file and line, or shard and key."""


class NonFiniteError(MindOmniError, ArithmeticError):
    """A loss or gradient that is NaN or infinite. The message names the step, the term and the record."""


class Interrupted(MindOmniError):
    """SIGTERM or Ctrl-C stopped the run after its state was saved; the same command resumes."""

    exit_code = INTERRUPTED
