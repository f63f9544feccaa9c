"""What every command line shares: mistakes are one line on standard error, and exit codes mean the same everywhere."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .errors import MindOmniError, MissingExtraError

USER_ERROR, INTERRUPTED = 2, 130
Module = tuple[str, str]
_LONGEST = 1000  # letters of a word; paths have up to 4,096, and few of them more than some hundred


def one_line(text: str) -> str:
    """A message as one line, with numbers and names of thousands of letters cut."""
    words = (word if len(word) <= _LONGEST else f"{word[:100]}…" for word in text.split())
    return " ".join(words)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage text."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, but an argument that nothing takes is an error of the command it was given to."""
        given = list(sys.argv[1:] if args is None else args)
        options, rest = self.parse_known_args(given, namespace)
        if rest:
            self._of(given).error(f"unrecognized arguments: {' '.join(rest)}")
        return options

    def _of(self, given: Sequence[str]) -> argparse.ArgumentParser:
        """The parser of the command that `given` begins with."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction) and given and given[0] in action.choices:
                return action.choices[given[0]]  # type: ignore[no-any-return]
        return self

    def error(self, message: str) -> Any:
        """Prints the line and exits with code 2."""
        self.exit(USER_ERROR, f"error: {one_line(message)} (see {self.prog} --help)\n")


def front_door(run: Callable[[], int], extra: str | None = None) -> int:
    """Runs a command and returns its exit code; an error that the user can mend is one line and code 2.

    extra: of pip, what installs the packages that the command imports.

    Such errors are MindOmniError, a package that is not installed, and the operating system's (a full disk, a read-only
    folder). Ctrl-C is code 130. A reader that closes the pipe, such as `head`, is no error. Other exceptions are bugs
    and keep their traceback.
    """
    try:
        return int(run())
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes it once more at exit
        return 0
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted\n")
        return INTERRUPTED
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if extra is None or not missing or missing == "mindomni_rt" or missing in sys.stdlib_module_names:
            raise
        sys.stderr.write(f"error: {MissingExtraError(missing, extra)}\n")
        return USER_ERROR
    except MindOmniError as error:
        sys.stderr.write(f"error: {one_line(str(error))}\n")
        return int(getattr(error, "exit_code", USER_ERROR))  # a run that was stopped has its own
    except OSError as error:
        if error.errno is None:
            raise
        where = f"{error.filename}: " if error.filename is not None else ""
        sys.stderr.write(f"error: {where}{error.strerror or error}\n")
        return USER_ERROR


def run_package(
    arguments: Sequence[str] | None,
    prog: str,
    description: str | None,
    commands: Mapping[str, Module],
    extra: str | None = None,
) -> int:
    """The command line of a package whose commands are modules with `add_arguments(parser)` and `run(options)`.

    commands: name -> (module, what it does); a module is imported only when its command is asked for. extra: of pip,
    what installs packages that a module lacks. Returns the exit code, that of --help and of argparse's mistakes too.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)

    def run() -> int:
        parser = Parser(prog=prog, description=description)
        choices = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
        for name, (module, text) in commands.items():
            if given[:1] != [name]:
                choices.add_parser(name, help=text)
                continue
            found = importlib.import_module(module)
            form: Any = argparse.RawDescriptionHelpFormatter
            found.add_arguments(choices.add_parser(name, help=text, description=found.__doc__, formatter_class=form))
        options = parser.parse_args(given)
        return int(importlib.import_module(commands[options.command][0]).run(options))

    try:
        return front_door(run, extra=extra)
    except SystemExit as end:  # of argparse: 0 after --help, 2 for a mistake
        return int(end.code or 0)
