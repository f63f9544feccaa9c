"""The artifact that export writes and a runtime loads: a folder of data that needs nothing else.

    manifest.json     format version, model configuration, graphs, files with sha256, what built it
    mllm/             tokenizer, chat template and preprocessing files of the checkpoint
    NAME.onnx, *.data or NAME.plan

The manifest is written last, into a temporary sibling folder that is renamed when whole: a build that is killed leaves
nothing under the final name. Hashes find damage, not malice: load engines only from those whom you trust.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any

from ..checkpoint.config import ModelConfig
from ..errors import BadBundleError, BadCheckpointError, UnsupportedDeviceError
from .contracts import STAGES, Profile

FORMAT = 1
MANIFEST = "manifest.json"
RUNTIMES = ("onnx", "tensorrt_rtx", "tensorrt")
_PARTIAL = ".partial-"
_SHA = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """One file: its hash, and its size to tell a truncated one."""

    sha256: str
    bytes: int

    def __post_init__(self) -> None:
        if not isinstance(self.sha256, str) or not _SHA.fullmatch(self.sha256):
            raise BadBundleError(f"{MANIFEST}: {self.sha256!r} is not a sha256")
        if not isinstance(self.bytes, int) or self.bytes < 0:
            raise BadBundleError(f"{MANIFEST}: {self.bytes!r} is not a size in bytes")


@dataclass(frozen=True, kw_only=True)
class GraphEntry:
    """One graph. file: ONNX or engine; data: the weight files it refers to; report: what the build measured."""

    stage: str
    file: str
    precision: str
    dtype: str
    data: tuple[str, ...] = ()
    report: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise BadBundleError(f"{MANIFEST}: stage {self.stage!r}; expected one of {', '.join(STAGES)}")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """manifest.json. targets: "sm_89", … or empty for any device; runtime_version: of the library that must load it."""

    model: ModelConfig
    runtime: str
    runtime_version: str
    targets: tuple[str, ...]
    dtype: str
    profile: Profile
    graphs: Mapping[str, GraphEntry]
    files: Mapping[str, FileEntry]
    built_by: Mapping[str, Any]
    format: int = FORMAT

    def __post_init__(self) -> None:
        if self.runtime not in RUNTIMES:
            raise BadBundleError(f"{MANIFEST}: runtime {self.runtime!r}; expected one of {', '.join(RUNTIMES)}")
        for name in self.files:
            safe_name(name)
        for name, graph in self.graphs.items():
            for file in (graph.file, *graph.data):
                if file not in self.files:
                    raise BadBundleError(f"{MANIFEST}: graph {name!r} needs {file}, which has no hash")

    def to_json(self) -> str:
        """Text of manifest.json."""
        data = {**asdict(self), "model": self.model.to_dict()}
        return json.dumps(data, indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str, where: Path) -> Manifest:
        """Reads manifest.json. Raises BadBundleError naming the file and what is wrong."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise BadBundleError(f"{where} is not whole JSON ({error}): copy or build the bundle again") from error
        if not isinstance(data, dict) or "format" not in data:
            raise BadBundleError(f"{where} is no bundle manifest: it lacks 'format'")
        if data["format"] != FORMAT:
            raise BadBundleError(
                f"{where}: bundle format {data['format']!r}, this version reads {FORMAT}. Build the bundle again with "
                "this version of mindomni-rt, or install the version that built it"
            )
        unknown = sorted(set(data) - {f.name for f in fields(cls)})
        if unknown:
            raise BadBundleError(f"{where}: unknown keys {unknown}")
        try:
            ranges = {axis: tuple(map(int, sizes)) for axis, sizes in data["profile"]["ranges"].items()}
            return cls(
                **{
                    **data,
                    "model": ModelConfig.from_dict(data["model"]),
                    "targets": tuple(data["targets"]),
                    "profile": Profile(name=data["profile"]["name"], ranges=ranges),  # type: ignore[arg-type]
                    "graphs": {
                        k: GraphEntry(**{**v, "data": tuple(v.get("data", ()))}) for k, v in data["graphs"].items()
                    },
                    "files": {k: FileEntry(**v) for k, v in data["files"].items()},
                }
            )
        except BadCheckpointError as error:
            raise BadBundleError(f"{where}: {error}") from error
        except (KeyError, TypeError, ValueError, AttributeError, AssertionError) as error:
            if isinstance(error, BadBundleError):
                raise
            raise BadBundleError(f"{where}: incomplete or of another shape: {type(error).__name__} {error}") from error

    def check_device(self, sm: str) -> None:
        """Raises UnsupportedDeviceError unless an engine for this architecture ("sm_89") is here."""
        if self.targets and sm not in self.targets:
            raise UnsupportedDeviceError(
                f"this bundle was built for {', '.join(self.targets)}; this GPU is {sm}. "
                f"Build one with: python -m export build CHECKPOINT --target {sm} --out BUNDLE"
            )

    def check_runtime(self, runtime: str, version: str) -> None:
        """Raises BadBundleError unless the installed library is the one that built the engines.

        A plan is read by the release that wrote it (major.minor); what a TensorRT build number may differ in, it tells
        itself.
        """
        if self.runtime != runtime:
            raise BadBundleError(f"this bundle runs on {self.runtime}, not on {runtime}")
        if self.targets and self.runtime_version.split(".")[:2] != version.split(".")[:2]:
            raise BadBundleError(
                f"this bundle's engines were built by {runtime} {self.runtime_version}; {version} is installed. "
                f"Install {runtime} {'.'.join(self.runtime_version.split('.')[:2])} or build the bundle again"
            )


@dataclass(frozen=True)
class Bundle:
    """A verified bundle."""

    folder: Path
    manifest: Manifest

    def path(self, file: str) -> Path:
        """Where a file of the manifest lies."""
        assert file in self.manifest.files, file
        return self.folder / file


def safe_name(name: str) -> PurePosixPath:
    """A file name of a manifest as a path inside the bundle. Raises BadBundleError for one that leads out of it."""
    path = PurePosixPath(name) if isinstance(name, str) else PurePosixPath("/")
    if path.is_absolute() or ".." in path.parts or not path.parts or "\\" in str(name) or ":" in str(name):
        raise BadBundleError(f"{MANIFEST} names {name!r}: expected a relative path inside the bundle")
    return path


def is_bundle(folder: Path) -> bool:
    """Whether a folder claims to be a bundle, or is the remains of a killed build."""
    return (folder / MANIFEST).exists() or _PARTIAL in folder.name


def open_bundle(folder: str | Path) -> Bundle:
    """Reads the manifest and checks every file's size and hash before anything is loaded. Raises BadBundleError."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    root = folder.resolve()
    for name, entry in manifest.files.items():
        path = folder / safe_name(name)
        if not path.is_file():
            raise BadBundleError(f"{path} is missing: copy or build the bundle again")
        if not path.resolve().is_relative_to(root):
            raise BadBundleError(f"{path} is a link that leads out of the bundle")
        size = path.stat().st_size
        if size != entry.bytes:
            kind = "truncated" if size < entry.bytes else "too long"
            raise BadBundleError(f"{path} is {kind}: {size} bytes, {entry.bytes} expected. Copy the bundle again")
    for name, entry in manifest.files.items():
        found = sha256(folder / name)
        if found != entry.sha256:
            raise BadBundleError(
                f"{folder / name} is corrupt: its sha256 is {found[:12]}…, the manifest says {entry.sha256[:12]}…. "
                "Copy or build the bundle again"
            )
    return Bundle(folder, manifest)


def read_manifest(folder: Path) -> Manifest:
    """The manifest alone, its files unchecked. Raises BadBundleError."""
    if not folder.is_dir():
        raise BadBundleError(f"{folder}: no such bundle folder")
    path = folder / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise BadBundleError(
            f"{folder} has no {MANIFEST}: it is not a bundle, or its build was stopped half-way. Build it again"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise BadBundleError(f"{path} cannot be read: {error}") from error
    return Manifest.from_json(text, path)


def sha256(path: Path) -> str:
    """A file's hash, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(folder: Path) -> dict[str, FileEntry]:
    """Entries of all files below a folder."""
    return {
        str(path.relative_to(folder).as_posix()): FileEntry(sha256=sha256(path), bytes=path.stat().st_size)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }


@contextmanager
def writing(folder: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `folder`, which takes its name when the block ends well and is removed otherwise.

    The block must leave a manifest. Raises BadBundleError if `folder` exists and may not be replaced; only an empty
    folder or a bundle ever is.
    """
    folder = Path(folder)
    _check_free(folder, overwrite)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}{_PARTIAL}", dir=folder.parent))
    try:
        yield temporary
        assert (temporary / MANIFEST).exists(), "a bundle without manifest"
        temporary.chmod(0o755)
        _take_name(temporary, folder, overwrite)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_free(folder: Path, overwrite: bool) -> bool:
    """Whether an old bundle stands there that may be replaced. Raises BadBundleError for what may not."""
    if not (folder.exists() or folder.is_symlink()) or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not overwrite:
        raise BadBundleError(f"{folder} exists; choose another --out or say --overwrite")
    if not (folder / MANIFEST).exists():
        raise BadBundleError(f"{folder} exists and is no bundle; it will not be overwritten")
    return True


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


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file under a temporary name and renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        Path(temporary).replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            Path(temporary).unlink()
