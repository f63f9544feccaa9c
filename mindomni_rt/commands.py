"""What every command line shares: mistakes are one line on standard error, and exit codes mean the same everywhere."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any

from .errors import MindOmniError

USER_ERROR, INTERRUPTED = 2, 130


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage text."""

    def error(self, message: str) -> Any:
        """Prints the line and exits with code 2."""
        self.exit(USER_ERROR, f"error: {' '.join(message.split())} (see {self.prog} --help)\n")


def front_door(run: Callable[[], int], name: str = "error") -> int:
    """Runs a command and returns its exit code; an error that the user can mend is one line and code 2.

    name: what the line begins with.

    Such errors are MindOmniError and the operating system's (a full disk, a read-only folder). Ctrl-C is code 130. A
    reader that closes the pipe, such as `head`, is no error. Other exceptions are bugs and keep their traceback.
    """
    try:
        return int(run())
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes it once more at exit
        return 0
    except KeyboardInterrupt:
        sys.stderr.write(f"{name}: interrupted\n")
        return INTERRUPTED
    except MindOmniError as error:
        sys.stderr.write(f"{name}: {' '.join(str(error).split())}\n")
        return USER_ERROR
    except OSError as error:
        if error.errno is None:
            raise
        where = f"{error.filename}: " if error.filename is not None else ""
        sys.stderr.write(f"{name}: {where}{error.strerror or error}\n")
        return USER_ERROR
