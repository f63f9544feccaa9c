"""What `mindomni_rt` exports, with every signature, equals tests/public_api.txt: a change of the interface is seen.

`python tests/test_public_api.py` writes the file anew. Review its diff and tell users in CHANGELOG.md.
"""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mindomni_rt

SNAPSHOT = Path(__file__).with_name("public_api.txt")


def describe(name: str, value: Any) -> Iterator[str]:
    """Lines that say how `value` is used: its signature, and for a class its bases and public members."""
    if isinstance(value, types.UnionType) or typing.get_origin(value) is typing.Union:
        yield f"{name} = {' | '.join(t.__name__ for t in typing.get_args(value))}"
    elif inspect.isclass(value):
        yield f"class {name}({', '.join(base.__name__ for base in value.__bases__)})"
        bases = [base for base in reversed(value.__mro__) if base.__module__.startswith("mindomni_rt")]
        for member, found in sorted({k: v for base in bases for k, v in vars(base).items()}.items()):
            if member != "__init__" and member.startswith("_"):
                continue
            if isinstance(found, (property, functools.cached_property)):
                yield f"    {member}: property"
            elif inspect.isroutine(found):
                yield f"    {member}{inspect.signature(getattr(value, member))}"
    elif callable(value):
        yield f"{name}{inspect.signature(value)}"
    else:
        yield f"{name}: {type(value).__name__}"


def public_api() -> str:
    lines = [line for name in sorted(mindomni_rt.__all__) for line in describe(name, getattr(mindomni_rt, name))]
    return "\n".join(lines) + "\n"


def test_public_api_is_as_recorded() -> None:
    assert public_api() == SNAPSHOT.read_text(encoding="utf-8"), "intended? run: python tests/test_public_api.py"


def test_a_change_is_seen() -> None:
    def before(path: str, *, seed: int | None = None) -> None: ...
    def after(path: str, *, seed: int = 0) -> None: ...

    assert list(describe("load", before)) != list(describe("load", after))


if __name__ == "__main__":
    SNAPSHOT.write_text(public_api(), encoding="utf-8")
