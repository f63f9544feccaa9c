"""What to install where a package is missing; the advice holds whether or not this project is on a package index."""

from __future__ import annotations

import platform
import re
import tomllib
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

PROJECT = "mindomni-rt"
_FEW = 4  # packages that are named one by one
_PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
_SELF = re.compile(rf"{PROJECT}\[([^]]*)\]")
_EXTRA = re.compile(r"extra == ['\"]([^'\"]+)['\"]")
_SYSTEM = re.compile(r"platform_system == ['\"](\w+)['\"]")
_AT_LEAST = re.compile(r"(?P<name>[\w.-]+)(\[[^]]*\])?(>=(?P<least>[\d.]+))?$")


def install(extra: str) -> str:
    """The command that installs what an extra needs and this environment lacks; all of it where nothing is lacking.

    A few packages are named. More are the extra of the project by name, which needs no index that holds the project:
    pip takes the installed one and adds what its extra lacks.
    """
    wanted = lacking(extra) or packages(extra)
    if 0 < len(wanted) <= _FEW:
        # Double quotes hold in every shell, cmd.exe too.
        return " ".join(["pip install", *(p if re.fullmatch(r"[\w.-]+", p) else f'"{p}"' for p in wanted)])
    if wanted and _of_installation():
        return f'pip install "{PROJECT}[{extra}]"'
    return f'pip install ".[{extra}]" in a checkout of {PROJECT}'


def lacking(extra: str) -> list[str]:
    """Requirements of an extra that this environment does not satisfy."""
    return [package for package in packages(extra) if not satisfied(package)]


def packages(extra: str) -> list[str]:
    """Requirements of an extra on this operating system, those of extras within it included; empty if it is unknown.

    They come from pyproject.toml in a checkout, where the metadata of an editable installation may be older, and from
    the metadata of the installed package elsewhere.
    """
    known = _of_checkout() or _of_installation()
    found: list[str] = []
    for line in known.get(extra, ()):
        requirement, _, marker = (part.strip() for part in line.partition(";"))
        system = _SYSTEM.search(marker)
        if inner := _SELF.fullmatch(requirement):
            found += [package for name in inner[1].split(",") for package in packages(name.strip())]
        elif system is None or system[1] == platform.system():
            found.append(requirement)
    return list(dict.fromkeys(found))


def satisfied(requirement: str) -> bool:
    """Whether NAME or NAME>=VERSION is installed. Other forms count as lacking: pip decides."""
    found = _AT_LEAST.match(requirement)
    if found is None:
        return False
    try:
        here = version(found["name"])
    except PackageNotFoundError:
        return False
    return not found["least"] or _release(here) >= _release(found["least"])


def _release(text: str) -> list[int]:
    """The numbers of a version before its suffix, without zeros at the end: 2.13.0+cpu is [2, 13]."""
    digits = re.match(r"\d+(\.\d+)*", text)
    numbers = [int(number) for number in digits[0].split(".")] if digits else []
    while numbers and not numbers[-1]:
        numbers.pop()
    return numbers


def _of_checkout() -> dict[str, list[str]]:
    try:
        project = tomllib.loads(_PYPROJECT.read_text(encoding="utf-8"))["project"]
    except (OSError, ValueError, KeyError):
        return {}
    return dict(project.get("optional-dependencies", {})) if project.get("name") == PROJECT else {}


def _of_installation() -> dict[str, list[str]]:
    try:
        lines = requires(PROJECT) or []
    except PackageNotFoundError:
        return {}
    known: dict[str, list[str]] = {}
    for line in lines:
        for extra in _EXTRA.findall(line):
            known.setdefault(extra, []).append(line)
    return known
