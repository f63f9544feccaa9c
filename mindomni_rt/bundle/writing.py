"""A bundle on its way to disk: in a temporary folder until it is whole, and never over what is no bundle."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from ..errors import BadBundleError
from ..files import parse_json, read_text
from .claim import Claim
from .manifest import MANIFEST, MOST_BYTES, PARTIAL, Manifest

_DESKTOP = (".DS_Store", "Thumbs.db", "desktop.ini")  # written by nobody in person


@contextmanager
def writing(folder: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `folder`, which takes its name when the block ends well and is removed otherwise.

    Folders that killed processes left for the same name are removed first. The block must leave a manifest. Raises
    BadBundleError if `folder` exists and may not be replaced; only an empty folder or a bundle ever is.
    """
    folder = Path(folder)
    _check_free(folder, overwrite)
    folder.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{folder.name}{PARTIAL}"
    claim = Claim(folder.parent, prefix, partial(tempfile.mkdtemp, prefix=prefix, dir=folder.parent))
    temporary = claim.path
    try:
        yield temporary
        assert (temporary / MANIFEST).exists(), "a bundle without manifest"
        temporary.chmod(0o755)
        _take_name(temporary, folder, overwrite)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        claim.free()


def check_name(folder: Path, overwrite: bool) -> None:
    """Raises BadBundleError unless a bundle may be written to `folder`, OSError where the path cannot be used."""
    if not folder.name or folder.name == "..":
        raise BadBundleError(f"--out {folder}: expected the name of a new folder")
    _check_free(folder, overwrite)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes manifest.json so that it is on disk before the folder takes its name."""
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        file.write(manifest.to_json())
        file.flush()
        os.fsync(file.fileno())


def _check_free(folder: Path, overwrite: bool) -> bool:
    """Whether an old bundle stands there that may be replaced. Raises BadBundleError for what may not."""
    if folder.is_symlink():
        raise BadBundleError(f"{folder} is a link; give the place that it leads to, or choose another --out")
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not overwrite:
        raise BadBundleError(f"{folder} exists; choose another --out or say --overwrite")
    kept = _written_by_others(folder)
    if kept is not None:
        raise BadBundleError(f"{folder} {kept}; it will not be overwritten. Choose another --out")
    return True


def _written_by_others(folder: Path) -> str | None:
    """What is in a folder that no build put there; None for a bundle, damaged or not, and nothing else."""
    try:
        found = parse_json(read_text(folder / MANIFEST, MOST_BYTES))
        listed = {*found["files"], MANIFEST, *_DESKTOP} if found["format"] else set()
    except (OSError, ValueError, LookupError, TypeError):
        return "exists and is no bundle"
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name not in listed and (path.is_symlink() or not path.is_dir()):
            return f"holds {name}, which is not of the bundle"
    return None


def _take_name(temporary: Path, folder: Path, overwrite: bool) -> None:
    """Renames a whole bundle to its name. What appeared there since the build began is not replaced."""
    old = None
    if _check_free(folder, overwrite):
        old = temporary.with_name(f"{temporary.name}.old")
        folder.rename(old)
    try:
        if folder.is_dir():
            folder.rmdir()  # empty, or it fails; Windows renames onto no folder at all
        temporary.rename(folder)
    except OSError as error:
        if old is not None:
            old.rename(folder)
        raise BadBundleError(f"{folder} appeared while the bundle was built; it was not replaced: {error}") from error
    if old is not None:
        shutil.rmtree(old)
