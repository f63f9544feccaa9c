"""Sealing a bundle again whose files were changed on purpose."""

from __future__ import annotations

from pathlib import Path

from ..files import parse_json, write_text
from .manifest import MANIFEST, hash_files
from .seal import sealed_json


def reseal(folder: str | Path) -> None:
    """Hashes a bundle's files again and seals its manifest, after files were changed on purpose."""
    path = Path(folder) / MANIFEST
    data = parse_json(path.read_bytes())
    data["files"] = {name: {"sha256": e.sha256, "bytes": e.bytes} for name, e in hash_files(Path(folder)).items()}
    write_text(path, sealed_json(data))
