"""docs/training-configuration.md from the dataclasses of `config.py`: every key with its type, default and meaning."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from dataclasses import is_dataclass
from typing import Any

from .config import Config

_FIELD = re.compile(r"^    (\w+): .*?  # (.*)$", re.MULTILINE)
_HEAD = """# Training configuration

Every key of a TOML file, or of `key=value` on the command line (`optim.lr=1e-4`). `mindomni train config-reference`
writes this page from `training/config.py`.
"""


def reference() -> str:
    """The page, as Markdown."""
    hints = typing.get_type_hints(Config)
    tables = [(name, hint) for name, hint in hints.items() if is_dataclass(hint)]
    lines = [_HEAD, *_table("", Config)]
    for name, kind in tables:
        lines += _table(name, typing.cast(type, kind))
    return "\n".join(lines)


def _table(name: str, kind: type) -> list[str]:
    notes = dict(_FIELD.findall(inspect.getsource(kind)))
    hints = typing.get_type_hints(kind)
    title = f"`[{name}]`" if name else "Top level"
    lines = [
        f"## {title}",
        "",
        kind.__doc__ or "",
        "",
        "| key | type | default | meaning |",
        "| --- | --- | --- | --- |",
    ]
    for field in dataclasses.fields(kind):
        if not is_dataclass(hints[field.name]):
            shown = f"`{_type(hints[field.name])}` | {_default(field)}"
            lines.append(f"| `{name}{'.' * bool(name)}{field.name}` | {shown} | {notes[field.name]} |")
    return [*lines, ""]


def _type(hint: Any) -> str:
    if typing.get_origin(hint) is tuple:
        return f"list of {typing.get_args(hint)[0].__name__}"
    return str(hint).replace(" | None", "") if not isinstance(hint, type) else hint.__name__


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is dataclasses.MISSING:
        return "required"
    value = field.default
    if value is None:
        return "unset"
    if isinstance(value, tuple):
        value = list(value)
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value!r}`".replace("'", '"')
