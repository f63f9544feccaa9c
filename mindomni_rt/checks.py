"""Limits of a dataclass's fields, written once in the field's type and checked when an object is made.

    height: Annotated[int, Whole(16, 3072, step=16)] = 1024

`check_fields` reads these from the class and raises the caller's error, which names the field, the value and the limit.
Booleans are not numbers; numpy's numbers are.
"""

from __future__ import annotations

import math
import numbers
import types
from collections.abc import Hashable, Mapping
from dataclasses import MISSING, dataclass, fields
from enum import Enum
from functools import cache
from typing import Any, Protocol, Union, cast, get_args, get_origin, get_type_hints


class Unset(Enum):
    """Stands for a field that its caller left out, where None could be taken for a value."""

    UNSET = "UNSET"

    def __repr__(self) -> str:
        return self.value


UNSET = Unset.UNSET
"""What stands in a field that was left out."""


class Check(Protocol):
    """Takes a value and returns it in its plain type. Raises ValueError with what was expected."""

    def __call__(self, value: Any) -> Any: ...


@dataclass(frozen=True)
class Whole:
    """A whole number within limits, a multiple of `step`."""

    low: int
    high: int
    step: int = 1

    def __call__(self, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise ValueError(str(self))
        number = int(value)
        if not self.low <= number <= self.high or number % self.step:
            raise ValueError(str(self))
        return number

    def __str__(self) -> str:
        kind = "a whole number" if self.step == 1 else f"a multiple of {self.step}"
        return f"{kind} from {self.low} to {self.high}"


@dataclass(frozen=True)
class Number:
    """A finite number within limits; `above` leaves the lower limit itself out."""

    low: float
    high: float
    above: bool = False

    def __call__(self, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise ValueError(str(self))
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not (math.isfinite(number) and self.low <= number <= self.high) or (self.above and number == self.low):
            raise ValueError(str(self))
        return number

    def __str__(self) -> str:
        if self.above:
            return f"a finite number above {self.low:g} and at most {self.high:g}"
        return f"a finite number from {self.low:g} to {self.high:g}"


@dataclass(frozen=True)
class OneOf:
    """One of a few words."""

    words: tuple[str, ...]

    def __call__(self, value: Any) -> str:
        if not isinstance(value, str) or value not in self.words:
            raise ValueError(str(self))
        return value

    def __str__(self) -> str:
        return f"one of {', '.join(self.words)}"


@dataclass(frozen=True)
class Many:
    """A tuple or list of at most `most` items, each checked."""

    item: Check
    most: int
    least: int = 0

    def __call__(self, value: Any) -> tuple[Any, ...]:
        if not isinstance(value, (tuple, list)) or not self.least <= len(value) <= self.most:
            raise ValueError(str(self))
        try:
            return tuple(self.item(item) for item in value)
        except ValueError as error:
            raise ValueError(str(self)) from error

    def __str__(self) -> str:
        count = str(self.most) if self.least == self.most else f"{self.least} to {self.most}"
        return f"a list of {count} items, each {self.item}"


class Flag:
    """True or False, nothing that only counts as such."""

    def __call__(self, value: Any) -> bool:
        if not isinstance(value, bool) and type(value).__name__ not in (
            "bool",
            "bool_",
        ):  # numpy's, without importing it
            raise ValueError(str(self))
        return bool(value)

    def __str__(self) -> str:
        return "True or False"


class Text:
    """A string, maybe empty."""

    def __call__(self, value: Any) -> str:
        if not isinstance(value, str):
            raise ValueError(str(self))
        return value

    def __str__(self) -> str:
        return "text"


class Object:
    """A mapping, such as a JSON object."""

    def __call__(self, value: Any) -> Any:
        if not isinstance(value, Mapping):
            raise ValueError(str(self))
        return value

    def __str__(self) -> str:
        return "an object"


_PLAIN: dict[type, Check] = {bool: Flag(), str: Text()}
_ABSENT: dict[type, Any] = {types.NoneType: None, Unset: UNSET}


def check_fields(owner: Any, error: type[Exception], prefix: str = "", none_is_default: bool = False) -> None:
    """Checks every field of a dataclass object that its type limits, and stores numbers in their plain types.

    none_is_default: None stands for the field's default. Raises `error` with the field's name.
    """
    for name, (check, absent, default) in _checks(cast(Hashable, type(owner))).items():
        value = getattr(owner, name)
        if value is None and none_is_default and default is not MISSING:
            value = default
        if any(value is one for one in absent):
            continue
        if check is not None:
            try:
                value = check(value)
            except ValueError as reason:
                more = "".join(f" or {getattr(one, 'value', one)}" for one in absent)
                raise error(f"{prefix}{name} = {shown(value)}: expected {reason}{more}") from None
        if value is not getattr(owner, name):
            # The documented way to set a field of a frozen dataclass from its own __post_init__.
            object.__setattr__(owner, name, value)


@cache
def _checks(owner: Hashable) -> dict[str, tuple[Check | None, tuple[Any, ...], Any]]:
    """For each field its check (or None), which of None and UNSET are allowed, and its default."""
    hints = get_type_hints(cast(type, owner), include_extras=True)
    return {f.name: (*_check_of(hints[f.name]), f.default) for f in fields(cast(Any, owner))}


def _check_of(hint: Any) -> tuple[Check | None, tuple[Any, ...]]:
    if get_origin(hint) in (Union, types.UnionType):
        found = [_check_of(part) for part in get_args(hint) if part not in _ABSENT]
        return found[0][0] if len(found) == 1 else None, _absent(hint)
    for extra in getattr(hint, "__metadata__", ()):
        if callable(extra):
            return extra, _absent(get_args(hint)[0])
    return _PLAIN.get(hint) if isinstance(hint, type) else None, ()


def _absent(hint: Any) -> tuple[Any, ...]:
    return tuple(value for kind, value in _ABSENT.items() if kind in get_args(hint))


def shown(value: Any, most: int = 80) -> str:
    """A value for a message: its repr, cut; numbers of thousands of digits and odd objects by their kind."""
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001 a repr may do anything, and Python refuses to print integers of 5,000 digits
        return f"a {type(value).__name__}"
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[:most]}… ({type(value).__name__})"
