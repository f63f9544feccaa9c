"""Mutations of one JSON document: types, numbers, texts, keys, lists, nesting, bytes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

from .change import Random, flipped

Path = tuple[Any, ...]
Result = tuple[bytes, Path, Any, Any]  # new text, where, old value, new value

ODD = ("", "x", "1", "true", 0, 1, -1, 2, 1.5, True, False, None, [], {}, [[]], [None], {"a": 1}, [0, 1, 2], ["x"])
# Written into the text as they stand: json.dumps has no way to write them.
RAW = ("NaN", "Infinity", "-Infinity", "9" * 5000, "1e999", "-1e999", "1e-999", "0x10", "'x'", "00", "tru")
NUMBERS = (
    0,
    -1,
    1,
    2,
    3,
    7,
    -0.0,
    0.5,
    1e-30,
    1e30,
    1e308,
    -1e308,
    2**31,
    -(2**31),
    2**32,
    2**53 + 1,
    2**63,
    2**64,
    10**30,
)
TEXTS = ("", " ", "a" * 300, "x" * 10**6, "\ud800", "\0", "é" * 200, "../x", "/etc/passwd", "a/../../b", "C:\\x", "%s%n",
         "{{ 7 * 7 }}", "None", "nan", "1e3", "\u202e", "true")  # fmt: skip


class Raw:
    """A piece of text in place of a value."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return f"Raw({self.text[:40]})"


def place(rng: Random, tree: Any) -> Path:
    """A random path, about as often in small objects as in large ones."""
    at: Path = ()
    while isinstance(tree, (dict, list)) and tree and (not at or rng.random() < 0.85):
        key = rng.choice(list(tree)) if isinstance(tree, dict) else rng.randrange(len(tree))
        at, tree = (*at, key), tree[key]
    return at


def value_at(tree: Any, at: Path) -> Any:
    for key in at:
        tree = tree[key]
    return tree


def dumps(tree: Any) -> bytes:
    """JSON text; Raw stands as it is, lone surrogates as escapes."""
    found: list[str] = []

    def default(value: Any) -> Any:
        assert isinstance(value, Raw)
        found.append(value.text)
        return f"@@{len(found) - 1}@@"

    text = json.dumps(tree, indent=1, default=default)
    for index, raw in enumerate(found):
        text = text.replace(f'"@@{index}@@"', raw)
    return text.encode("ascii", "replace")


def _set(tree: Any, at: Path, value: Any) -> Any:
    if not at:
        return value
    tree = copy.deepcopy(tree)
    value_at(tree, at[:-1])[at[-1]] = value
    return tree


def type_changed(rng: Random, tree: Any) -> Result:
    at = place(rng, tree)
    old = value_at(tree, at)
    same = (int, float) if type(old) in (int, float) else (type(old),)
    new = rng.choice([v for v in ODD if type(v) not in same] + [Raw(r) for r in RAW])
    return dumps(_set(tree, at, new)), at, old, new


def number_changed(rng: Random, tree: Any) -> Result:
    at, old = _of_type(rng, tree, (int, float))
    near = [old + 1, old - 1, old * 2, old / 2, -old, float(old), old * 1.001]
    new = rng.choice([*NUMBERS, *near, *near])
    new = int(new) if isinstance(old, int) and isinstance(new, float) and new == int(new) and abs(new) < 1e15 else new
    return dumps(_set(tree, at, new)), at, old, new


def text_changed(rng: Random, tree: Any) -> Result:
    at, old = _of_type(rng, tree, (str,))
    more = [old.upper(), old + "x", old[:-1], old * 2, old[::-1], f" {old}"]
    new = rng.choice([*TEXTS, *more])
    return dumps(_set(tree, at, new)), at, old, new


def key_changed(rng: Random, tree: Any) -> Result:
    at, old = _of_type(rng, tree, (dict,))
    if not old:
        return dumps(_set(tree, at, {"x": 1})), at, old, {"x": 1}
    key, new = rng.choice(list(old)), dict(old)
    action = rng.randrange(4)
    if action == 0:
        del new[key]
        return dumps(_set(tree, at, new)), (*at, key), old[key], None
    if action == 1:
        new[rng.choice((key + "x", key.upper(), "", "a" * 300, "__class__", f" {key}"))] = new.pop(key)
        return dumps(_set(tree, at, new)), (*at, key), old[key], None
    if action == 2:
        new[rng.choice(("x", "", "__init__", "auto_map", "_target_", "a" * 300))] = rng.choice(ODD)
        return dumps(_set(tree, at, new)), at, old, new
    # The same key twice: what stands last counts, as in every JSON reader.
    twice = dumps(new).decode()
    value = json.dumps(rng.choice(ODD))
    text = dumps(_set(tree, at, Raw(twice.replace("{", f"{{{json.dumps(key)}: {value},", 1))))
    return text, at, old, old


def list_changed(rng: Random, tree: Any) -> Result:
    at, old = _of_type(rng, tree, (list,))
    action = rng.randrange(6)
    if action == 0 or not old:
        new: Any = []
    elif action == 1:
        new = old[:-1]
    elif action == 2:
        new = [*old, old[-1]]
    elif action == 3:
        new = old[::-1]
    elif action == 4:
        new = (old * 3000)[:3000]
    else:
        new = [*old[:-1], rng.choice(ODD)]
    return dumps(_set(tree, at, new)), at, old, new


def deep(rng: Random, tree: Any) -> Result:
    at = place(rng, tree)
    count = rng.choice((10, 50, 500, 100_000))
    opening, closing = rng.choice((("[", "]"), ('{"a":', "}")))
    new = Raw(opening * count + "1" + closing * count)
    return dumps(_set(tree, at, new)), at, value_at(tree, at), new


def bytes_changed(rng: Random, tree: Any, text: bytes) -> Result:
    action = rng.randrange(6)
    if action < 3:
        new = flipped(rng, text, 4)
    elif action == 3:
        new = text[: rng.randrange(len(text))]
    elif action == 4:
        new = rng.choice(
            (b"", b"\xef\xbb\xbf" + text, text.decode().encode("utf-16"), b"\0" * 100, b"null", b"[]", b"{}", b'""')
        )
    else:
        new = text + rng.choice((b"x", b"{}", b"\0", b" " * 10**6, text))
    return new, (), None, None


def _of_type(rng: Random, tree: Any, kinds: tuple[type, ...]) -> tuple[Path, Any]:
    """A place that holds one of these types; any place, if a few tries find none."""
    for _ in range(60):
        at = place(rng, tree)
        for end in range(len(at), -1, -1):
            value = value_at(tree, at[:end])
            if type(value) in kinds:
                return at[:end], value
    if kinds == (dict,):
        return (), tree
    return (), kinds[0]()


MUTATIONS: dict[str, Callable[[Random, Any], Result]] = {
    "json type": type_changed,
    "json number": number_changed,
    "json text": text_changed,
    "json key": key_changed,
    "json list": list_changed,
    "json nesting": deep,
}
