"""A manifest's own hash: one that was edited or damaged is refused.

It finds accidents, not malice: whoever edits a manifest can seal it again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

KEY = "seal"


def seal_of(data: Mapping[str, Any]) -> str:
    """sha256 of a manifest's JSON without its seal, keys sorted, no spaces."""
    rest = {key: value for key, value in data.items() if key != KEY}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode("ascii")).hexdigest()


def sealed_json(data: Mapping[str, Any]) -> str:
    """Text of manifest.json with its seal."""
    return json.dumps({**data, KEY: seal_of(data)}, indent=1, sort_keys=True) + "\n"
