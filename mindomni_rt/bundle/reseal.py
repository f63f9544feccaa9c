"""Sealing a bundle again whose files were changed on purpose."""

from __future__ import annotations

from pathlib import Path

from ..checks import shown
from ..errors import BadBundleError
from ..files import parse_json, read_bytes, why, write_text
from .manifest import MANIFEST, MOST_BYTES, hash_files
from .seal import sealed_json


def reseal(folder: str | Path) -> None:
    """Hashes a bundle's files again and seals its manifest, after files were changed on purpose.

    Raises BadBundleError for a folder that is none.
    """
    path = Path(folder) / MANIFEST
    try:
        data = parse_json(read_bytes(path, MOST_BYTES))
    except FileNotFoundError as error:
        raise BadBundleError(f"{shown(str(folder))} has no {MANIFEST}: expected the folder of a bundle") from error
    except (OSError, ValueError) as error:
        raise BadBundleError(f"{path} cannot be read: {why(error)}") from error
    if not isinstance(data, dict):
        raise BadBundleError(f"{path} is a JSON {type(data).__name__}, expected an object")
    data["files"] = {name: {"sha256": e.sha256, "bytes": e.bytes} for name, e in hash_files(Path(folder)).items()}
    write_text(path, sealed_json(data))
