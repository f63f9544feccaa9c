"""What builds keep for later ones, in one folder: traced graphs, calibration ranges, engines, and the parts of builds
that did not end; beside them what loading a bundle keeps.

    graphs/KEY.onnx        a traced graph without weights, by configuration, compute type, code and versions
    ranges/KEY.json        activation ranges of a calibration
    engines/KEY.plan       engines of TensorRT
    unfinished/KEY/        rounded weights with their graphs, until the bundle that they are for is whole
    checked/KEY.json       which files of bundles were hashed, by what tells that they have not changed

Entries are hard links to the files of a build while it runs, so that they cost no second copy. A bundle that is done
shares no file with another: `onnx` refuses weights with two names, and a change in one place would be one in the other.
Engines stay linked to their entries; their hash is compared before one is used again.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import mindomni_rt
from mindomni_rt.bundle.manifest import sha256
from mindomni_rt.files import cache_folder, replace_file, write_text

logger = logging.getLogger(__name__)
KINDS = ("graphs", "ranges", "engines", "unfinished", "checked")
# Sources that decide a trace, and those that decide what its weights become.
TRACING = (
    "export/graphs.py",
    "export/traces.py",
    "export/layers.py",
    "export/store.py",
    "model/*.py",
    "bundle/contracts.py",
    "kernels/node.py",
    "kernels/onnx_function.py",
)
WEIGHTS = (*TRACING, "export/*.py", "memory/precision.py")
_NOTE = "reports.json"
_PACKAGES = ("torch", "onnx", "onnxscript", "onnx-ir", "numpy", "ml-dtypes")
_BLOCK, _BLOCKS = 65536, 64  # of a weights file that its identity is read from


def default_cache() -> Path:
    """Where builds keep things: $XDG_CACHE_HOME/mindomni-rt."""
    return cache_folder()


def cache_sizes(folder: Path) -> dict[str, int]:
    """Bytes of each kind of entry in a cache folder."""
    return {
        kind: sum(p.stat().st_size for p in (folder / kind).rglob("*") if p.is_file() and not p.is_symlink())
        for kind in KINDS
    }


def clear_cache(folder: Path) -> None:
    """Removes all entries; other files of the folder stay."""
    for kind in KINDS:
        shutil.rmtree(folder / kind, ignore_errors=True)


def link(source: Path, target: Path) -> None:
    """A second name for the same bytes, or a copy where the file system has no links."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def unshare(path: Path) -> None:
    """Gives a file bytes of its own if other names lead to the same ones, as those of a build of the same parts do."""
    if path.stat().st_nlink > 1:
        replace_file(path, lambda temporary: shutil.copyfile(path, temporary))


def key_of(parts: Mapping[str, Any], code: Sequence[str]) -> str:
    """Hash of everything that decides an entry: parts (JSON-able), code and library versions.

    code: patterns of the sources that made it, below the package, such as `TRACING`.
    """
    text = json.dumps({**parts, "code": _code(tuple(code)), "versions": _versions()}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@cache
def _code(patterns: tuple[str, ...]) -> str:
    root = Path(mindomni_rt.__file__).resolve().parent
    found = {f.relative_to(root).as_posix(): f for pattern in patterns for f in root.glob(pattern)}
    return hashlib.sha256("".join(name + sha256(found[name]) for name in sorted(found)).encode()).hexdigest()


@cache
def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


def identity(files: Iterable[Path]) -> list[str]:
    """What tells weights files apart without reading them whole: size, time of change, and blocks all over the file."""
    found = []
    for path in sorted(set(files)):
        state = path.stat()
        digest = hashlib.sha256(f"{path.name} {state.st_size} {state.st_mtime_ns}".encode())
        with path.open("rb") as file:
            for index in range(_BLOCKS):
                file.seek(index * state.st_size // _BLOCKS)
                digest.update(file.read(_BLOCK))
        found.append(digest.hexdigest())
    return found


@dataclass(frozen=True)
class Unfinished:
    """Finished parts of builds that are not whole yet, each a folder of files with a note. None: nothing is kept."""

    folder: Path | None

    def take(self, key: str, work: Path) -> dict[str, Any] | None:
        """Puts the kept files of a key into `work`. Returns their note, None if there are none or they are damaged."""
        if self.folder is None:
            return None
        try:
            return self._take(self.folder / key, work)
        except FileNotFoundError:  # none there, or another build of the same parts ended meanwhile and dropped them
            return None

    def _take(self, kept: Path, work: Path) -> dict[str, Any] | None:
        note: dict[str, Any] = json.loads((kept / _NOTE).read_text(encoding="utf-8"))
        if any(not (kept / name).is_file() or sha256(kept / name) != found for name, found in note["files"].items()):
            if kept.exists():
                logger.warning("%s is damaged; its graphs are made again", kept)
            self.drop(kept.name)
            return None
        try:
            for name in note["files"]:
                link(kept / name, work / name)
        except FileNotFoundError:
            for name in note["files"]:
                (work / name).unlink(missing_ok=True)
            raise
        return dict(note["reports"])

    def keep(self, key: str, work: Path, files: Sequence[str], reports: Mapping[str, Any]) -> None:
        """Keeps files of `work` under a key; the entry appears whole or not at all."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=".partial-", dir=self.folder))
        try:
            for name in files:
                link(work / name, part / name)
            note = {"files": {name: sha256(part / name) for name in files}, "reports": dict(reports)}
            write_text(part / _NOTE, json.dumps(note))
            self.drop(key)
            try:
                part.rename(self.folder / key)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):  # else another build kept the same parts
                    raise
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def drop(self, key: str) -> None:
        """Removes an entry: its bundle is whole."""
        if self.folder is not None:
            shutil.rmtree(self.folder / key, ignore_errors=True)
