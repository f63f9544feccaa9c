"""A manifest's own hash: one that was edited or damaged is refused.

It finds accidents, not malice: whoever edits a manifest can seal it again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import parse_json, write_text

KEY = "seal"


def seal_of(data: Mapping[str, Any]) -> str:
    """sha256 of a manifest's JSON without its seal, keys sorted, no spaces."""
    rest = {key: value for key, value in data.items() if key != KEY}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode("ascii")).hexdigest()


def sealed_json(data: Mapping[str, Any]) -> str:
    """Text of manifest.json with its seal."""
    return json.dumps({**data, KEY: seal_of(data)}, indent=1, sort_keys=True) + "\n"


def reseal(folder: str | Path) -> None:
    """Hashes a bundle's files again and seals its manifest, after files were changed on purpose."""
    from .manifest import MANIFEST, hash_files

    path = Path(folder) / MANIFEST
    data = parse_json(path.read_bytes())
    data["files"] = {name: {"sha256": e.sha256, "bytes": e.bytes} for name, e in hash_files(Path(folder)).items()}
    write_text(path, sealed_json(data))
