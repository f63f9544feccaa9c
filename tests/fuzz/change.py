"""What a mutation does to a model's folder."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Random = random.Random


@dataclass(frozen=True)
class Special:
    """Something that is no regular file: kind "link" (to `target`), "folder", "pipe"."""

    kind: str
    target: str = ""


Content = bytes | Special | None  # None: the file is removed


@dataclass(frozen=True, kw_only=True)
class Change:
    """New contents by relative path.

    asked: why the result may differ from the unchanged model's, empty if it may not. An example is another weight. A
    result that differs without such a reason is a failure, "silently different".
    needs_image: the request has a reference image, so that the changed part is used.
    """

    files: Mapping[str, Content]
    note: str
    asked: str = ""
    needs_image: bool = False
    listed: bool = True  # a new file of a bundle stands in its manifest


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One mutated input. source: the model it is made of; call: what to do instead of loading a folder."""

    seed: int
    number: int
    target: str
    kind: str
    source: str
    change: Change
    fixed: bool = True
    call: Callable[..., Any] | None = field(default=None, repr=False)

    @property
    def asked(self) -> str:
        """Why the result may differ. A bundle whose hashes do not hold may give no other result, whatever changed."""
        return self.change.asked if self.fixed or self.target != "bundle" else ""

    @property
    def name(self) -> str:
        return f"{self.target}, {self.kind}"


def pick(rng: Random, values: Mapping[str, bytes], *endings: str) -> str:
    """A file by the end of its name."""
    return rng.choice([name for name in sorted(values) if name.endswith(endings)])


def flipped(rng: Random, data: bytes, most: int = 8, start: int = 0) -> bytes:
    """A few bytes changed, removed, repeated or inserted."""
    out = bytearray(data)
    for _ in range(rng.randint(1, most)):
        at = rng.randrange(start, max(start + 1, len(out)))
        action = rng.randrange(5)
        if action < 2 and at < len(out):
            out[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif action == 2:
            del out[at : at + rng.choice((1, 1, 2, 4, 64))]
        elif action == 3:
            out[at:at] = out[at : at + rng.choice((1, 4, 64, 1024))]
        else:
            out[at:at] = rng.randbytes(rng.choice((1, 4, 64)))
    return bytes(out)
