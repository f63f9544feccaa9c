"""The front door of every command: exit codes, one line for each mistake."""

from __future__ import annotations

import errno
import subprocess
import sys

import pytest

from mindomni_rt.commands import INTERRUPTED, USER_ERROR, Parser, front_door
from mindomni_rt.errors import BadRequestError
from mindomni_rt.training.errors import Interrupted


def raising(error: BaseException) -> int:
    raise error


def test_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert front_door(lambda: 0) == 0 and front_door(lambda: 1) == 1
    cases = (
        (BadRequestError("size 7:\n  expected a multiple"), USER_ERROR, "error: size 7: expected a multiple\n"),
        (KeyboardInterrupt(), INTERRUPTED, "error: interrupted\n"),
        (Interrupted("stopped after step 7, saved"), INTERRUPTED, "error: stopped after step 7, saved\n"),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), USER_ERROR, "error: /x: No space left on device\n"),
    )
    for error, code, line in cases:
        assert front_door(lambda error=error: raising(error)) == code  # type: ignore[misc]
        assert capsys.readouterr().err == line


def test_a_bug_keeps_its_traceback() -> None:
    for error in (ZeroDivisionError(), OSError("of no errno")):
        with pytest.raises(type(error)):
            front_door(lambda error=error: raising(error))  # type: ignore[misc]


def test_a_closed_pipe_is_no_error() -> None:
    code = """
import sys
from mindomni_rt.commands import front_door
def run():
    for _ in range(100000): print("line")
    return 0
sys.exit(front_door(run))
"""
    reader = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert reader.stdout is not None and reader.stderr is not None
    reader.stdout.readline()
    reader.stdout.close()
    assert reader.wait(timeout=60) == 0 and reader.stderr.read() == b""


def test_an_unknown_option_points_to_the_help_of_its_command(capsys: pytest.CaptureFixture[str]) -> None:
    parser = Parser(prog="mindomni export")
    parser.add_subparsers(required=True).add_parser("build").add_argument("--out")
    cases = ((["build", "--tarrget=a"], "mindomni export build"), (["--x", "build"], "mindomni export"))
    for arguments, program in cases:
        with pytest.raises(SystemExit):
            parser.parse_args(arguments)
        error = capsys.readouterr().err
        assert error.endswith(f"(see {program} --help)\n") and "unrecognized arguments: --" in error


def test_the_parsers_errors_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    parser = Parser(prog="mindomni export")
    commands = parser.add_subparsers(required=True)
    commands.add_parser("build").add_argument("--target", choices=("a", "b"))
    for arguments in ([], ["built"], ["build", "--target", "c"], ["build", "--tarrget=a"]):
        with pytest.raises(SystemExit) as stopped:
            parser.parse_args(arguments)
        error = capsys.readouterr().err
        assert stopped.value.code == USER_ERROR and error.count("\n") == 1 and error.startswith("error: "), error
