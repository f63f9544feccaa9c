"""A mutated bundle's hashes and seal, made to hold again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from mindomni_rt.bundle.seal import seal_of

from .change import Content
from .sources import Source

MANIFEST = "manifest.json"


def fixed(source: Source, files: Mapping[str, Content], listed: bool) -> dict[str, Content]:
    """The files with a manifest that agrees with them, as far as a mutated manifest can be understood."""
    out = dict(files)
    manifest = files.get(MANIFEST, source.files[MANIFEST])
    if not isinstance(manifest, bytes):
        return out
    try:
        data = json.loads(manifest)
        if MANIFEST not in files:
            _update(data["files"], files, listed)
            manifest = json.dumps(data, indent=1, sort_keys=True).encode()
        old, new = data.get("seal"), seal_of(data)
    except (ValueError, TypeError, AttributeError, RecursionError):
        return out
    if isinstance(old, str) and old:
        manifest = manifest.replace(old.encode(), new.encode())
    out[MANIFEST] = manifest
    return out


def _update(entries: dict[str, object], files: Mapping[str, Content], listed: bool) -> None:
    for name, content in files.items():
        if content is None:
            entries.pop(name, None)
        elif isinstance(content, bytes) and (listed or name in entries):
            entries[name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
