"""The artifact that export writes and a runtime loads: a folder of data that needs nothing else.

    manifest.json     format version, model configuration, graphs, files with sha256, what built it
    mllm/             tokenizer, chat template and preprocessing files of the checkpoint
    NAME.onnx, *.data or NAME.plan

Only files that the manifest lists exist: others are refused, since a tokenizer or template among them would change
what is painted. The manifest is written last, into a temporary sibling folder that is renamed when whole: a build that
is killed leaves nothing under the final name. Hashes find damage, not malice: load engines only from those whom you
trust.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from ..checkpoint.config import ModelConfig
from ..checks import Many, Object, OneOf, Text, Whole, check_fields, shown
from ..errors import BadBundleError, BadCheckpointError, UnsupportedDeviceError
from ..files import parse_json, read_text, require_regular, why
from .checked import Checked
from .contracts import DTYPE_BYTES, OPTIONAL, STAGES, Profile, graph_specs
from .interface import check_interface
from .onnx_file import OnnxFile, read_onnx
from .parts import check_parts
from .seal import KEY, seal_of, sealed_json

FORMAT = 1
MANIFEST = "manifest.json"
RUNTIMES = ("onnx", "tensorrt_rtx", "tensorrt")
TEMPLATES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
MOST_BYTES = 2**26
PARTIAL = ".partial-"
"""In the name of a folder that a build has not finished."""
# What a hub, git or a desktop puts into a folder and nothing here reads.
_UNREAD = frozenset(
    ("README.md", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", ".gitattributes", ".gitignore", ".git", ".cache",
     ".DS_Store", "Thumbs.db", "desktop.ini")
)  # fmt: skip
_SHA = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """One file: its hash, and its size to tell a truncated one."""

    sha256: str
    bytes: int

    def __post_init__(self) -> None:
        if not isinstance(self.sha256, str) or not _SHA.fullmatch(self.sha256):
            raise BadBundleError(f"{MANIFEST}: {shown(self.sha256)} is not a sha256")
        if type(self.bytes) is not int or not 0 <= self.bytes < 2**50:
            raise BadBundleError(f"{MANIFEST}: {shown(self.bytes)} is not a size in bytes")


@dataclass(frozen=True, kw_only=True)
class GraphEntry:
    """One graph. file: ONNX or engine; data: the weight files it refers to; report: what the build measured.

    parts: files that compute the same one after another, for a runtime that opens them side by side (`parts.py`).
    """

    stage: str
    file: str
    precision: str
    dtype: Annotated[str, OneOf(tuple(DTYPE_BYTES))]
    data: Annotated[tuple[str, ...], Many(Text(), most=64)] = ()
    report: Annotated[Mapping[str, Any], Object()] = field(default_factory=dict)
    parts: Annotated[tuple[str, ...], Many(Text(), most=64)] = ()

    @property
    def files(self) -> tuple[str, ...]:
        """All files of the graph."""
        return (self.file, *self.parts, *self.data)

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise BadBundleError(f"{MANIFEST}: stage {shown(self.stage)}; expected one of {', '.join(STAGES)}")
        check_fields(self, BadBundleError, f"{MANIFEST}: graph of stage {self.stage}: ")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """manifest.json. targets: "sm_89", … or empty for any device; runtime_version: of the library that must load it."""

    model: ModelConfig
    runtime: Annotated[str, OneOf(RUNTIMES)]
    runtime_version: str
    targets: Annotated[tuple[str, ...], Many(Text(), most=64)]
    dtype: Annotated[str, OneOf(("float32", "float16", "bfloat16"))]
    profile: Profile
    graphs: Mapping[str, GraphEntry]
    files: Mapping[str, FileEntry]
    built_by: Annotated[Mapping[str, Any], Object()]
    format: int = FORMAT

    def __post_init__(self) -> None:
        check_fields(self, BadBundleError, f"{MANIFEST}: ")
        for name in self.files:
            safe_name(name)
        for needed in (("mllm/tokenizer.json",), ("mllm/vocab.json", "mllm/merges.txt")):
            if all(name in self.files for name in needed):
                break
        else:
            raise BadBundleError(f"{MANIFEST}: files lacks mllm/tokenizer.json: build the bundle again")
        if not any(f"mllm/{name}" in self.files for name in TEMPLATES):
            raise BadBundleError(
                f"{MANIFEST}: files lacks a chat template, mllm/{TEMPLATES[0]}: build the bundle again"
            )
        specs = graph_specs(self.model)
        if lacking := [name for name in specs if name not in {*self.graphs, *OPTIONAL}]:
            raise BadBundleError(f"{MANIFEST}: graphs lacks {lacking[0]}: build the bundle again")
        for name, graph in self.graphs.items():
            if name not in specs or specs[name].stage != graph.stage:
                raise BadBundleError(
                    f"{MANIFEST}: graph {shown(name)} of stage {graph.stage} is none that this version knows: build "
                    "the bundle again"
                )
            for file in graph.files:
                if file not in self.files:
                    raise BadBundleError(f"{MANIFEST}: graph {name!r} needs {file}, which has no hash")

    def to_json(self) -> str:
        """Text of manifest.json."""
        return sealed_json({**asdict(self), "model": self.model.to_dict()})

    @classmethod
    def from_json(cls, text: str, where: Path) -> Manifest:
        """Reads manifest.json. Raises BadBundleError naming the file and what is wrong."""
        try:
            data = parse_json(text)
        except ValueError as error:
            raise BadBundleError(f"{where} is not whole JSON ({error}): copy or build the bundle again") from error
        if not isinstance(data, dict) or "format" not in data:
            raise BadBundleError(f"{where} is no bundle manifest: it lacks 'format'")
        if data["format"] != FORMAT or type(data["format"]) is not int:
            raise BadBundleError(
                f"{where}: bundle format {shown(data['format'])}, this version reads {FORMAT}. Build the bundle again "
                "with this version of mindomni-rt, or install the version that built it"
            )
        unknown = sorted(set(data) - {f.name for f in fields(cls)} - {KEY})
        if unknown:
            raise BadBundleError(f"{where}: unknown keys {unknown}")
        if data.pop(KEY, None) != seal_of(data):
            raise BadBundleError(
                f"{where} was edited or damaged: its own hash is another. Copy or build the bundle again; after a "
                "change on purpose: python -c \"from mindomni_rt.bundle.reseal import reseal; reseal('BUNDLE')\""
            )
        try:
            ranges = {str(axis): _range(sizes) for axis, sizes in data["profile"]["ranges"].items()}
            return cls(
                **{
                    **data,
                    "model": ModelConfig.from_dict(data["model"]),
                    "targets": data["targets"],
                    "profile": Profile(name=Text()(data["profile"]["name"]), ranges=ranges),
                    "graphs": {k: GraphEntry(**v) for k, v in data["graphs"].items()},
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
                f"Build one with: mindomni export build CHECKPOINT --target {sm} --out BUNDLE"
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


def _range(sizes: Any) -> tuple[int, int, int]:
    low, best, high = Many(Whole(1, 2**40), 3, 3)(sizes)
    return low, best, high


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
    odd = not isinstance(name, str) or set(name) & set("\\:\0") or any(len(part) > 200 for part in path.parts)
    if odd or path.is_absolute() or ".." in path.parts or not path.parts:
        raise BadBundleError(f"{MANIFEST} names {shown(name)}: expected a relative path inside the bundle")
    return path


def is_bundle(folder: Path) -> bool:
    """Whether a folder claims to be a bundle, or is the remains of a killed build."""
    return (folder / MANIFEST).exists() or PARTIAL in folder.name


def open_bundle(folder: str | Path, *, again: bool = False) -> Bundle:
    """Reads the manifest and checks every file and graph before anything is loaded. Raises BadBundleError.

    again: hash also the files that were hashed before and have not changed since (`checked`).
    Checked: that the folder holds the listed files and no others, their sizes and hashes, that no link leads out, and
    that each ONNX graph has the inputs and outputs of its contract and names no other data files than the manifest.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    _check_listed(folder, manifest)
    for name, entry in manifest.files.items():
        path = folder / safe_name(name)
        try:
            size = require_regular(path)
        except FileNotFoundError as error:
            raise BadBundleError(f"{path} is missing: copy or build the bundle again") from error
        except OSError as error:
            raise BadBundleError(f"{path} {why(error)}") from error
        if size != entry.bytes:
            kind = "truncated" if size < entry.bytes else "too long"
            raise BadBundleError(f"{path} is {kind}: {size} bytes, {entry.bytes} expected. Copy the bundle again")
    checked = Checked(folder)
    for name, entry in manifest.files.items():
        if not again and checked.has(name, entry.sha256):
            continue
        found = sha256(folder / name)
        if found == entry.sha256:
            checked.add(name, found)
        else:
            raise BadBundleError(
                f"{folder / name} is corrupt: its sha256 is {found[:12]}…, the manifest says {entry.sha256[:12]}…. "
                "Copy or build the bundle again"
            )
    checked.save()
    if manifest.runtime == "onnx":
        _check_graphs(folder, manifest)
    return Bundle(folder, manifest)


def _check_listed(folder: Path, manifest: Manifest) -> None:
    """Refuses files that the manifest does not list and links that lead out of the bundle.

    The hub's cache is the one exception: its files are links into the `blobs` folder beside `snapshots`.
    """
    root = folder.resolve()
    places = [root]
    if root.parent.name == "snapshots":
        places.append(root.parent.parent / "blobs")
    for path in walk(folder):
        name = path.relative_to(folder).as_posix()
        if name not in manifest.files and name != MANIFEST:
            raise BadBundleError(f"{path} is not listed in {MANIFEST}: remove it, or copy the bundle again")
        # Unlike Path.resolve, realpath leaves a link to itself as it is; that one is named when its size is read.
        if path.is_symlink() and not any(Path(os.path.realpath(path)).is_relative_to(place) for place in places):
            raise BadBundleError(f"{path} is a link that leads out of the bundle")


def _check_graphs(folder: Path, manifest: Manifest) -> None:
    specs = graph_specs(manifest.model)
    for name, graph in manifest.graphs.items():
        whole, *parts = [_read_graph(folder / file, name, graph) for file in (graph.file, *graph.parts)]
        check_interface(str(folder / graph.file), specs[name], manifest.dtype, whole.inputs, whole.outputs)
        if parts:
            check_parts(str(folder), whole, zip(graph.parts, parts, strict=True))


def _read_graph(path: Path, name: str, graph: GraphEntry) -> OnnxFile:
    found = read_onnx(path)
    other = sorted(found.data - set(graph.data))
    if other:
        raise BadBundleError(f"{path} reads the file {shown(other[0])}, which {MANIFEST} does not give to graph {name}")
    if found.nested:  # no graph of ours has one, and a loop need not end
        raise BadBundleError(f"{path} has a graph inside its graph (Loop, Scan or If): build the bundle again")
    return found


def walk(folder: Path) -> Iterator[Path]:
    """Every file below a bundle's folder, and links to folders, which are not followed. What a hub adds to a folder
    and nothing reads (README.md, .gitattributes, .cache, …) is left out."""
    for place, folders, files in os.walk(folder):
        at = Path(place)
        if at == folder:
            folders[:] = [name for name in folders if name not in _UNREAD]
            files = [name for name in files if name not in _UNREAD]
        yield from (at / name for name in sorted(files))
        yield from (at / name for name in sorted(folders) if (at / name).is_symlink())


def read_manifest(folder: Path) -> Manifest:
    """The manifest alone, its files unchecked. Raises BadBundleError."""
    if not folder.is_dir():
        raise BadBundleError(f"{folder}: no such bundle folder")
    path = folder / MANIFEST
    try:
        text = read_text(path, MOST_BYTES)
    except FileNotFoundError as error:
        raise BadBundleError(
            f"{folder} has no {MANIFEST}: it is not a bundle, or its build was stopped half-way. Build it again"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise BadBundleError(f"{path} cannot be read: {why(error)}") from error
    return Manifest.from_json(text, path)


def sha256(path: Path) -> str:
    """A file's hash, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(folder: Path) -> dict[str, FileEntry]:
    """Entries of all files below a folder."""
    return {
        str(path.relative_to(folder).as_posix()): FileEntry(sha256=sha256(path), bytes=path.stat().st_size)
        for path in sorted(walk(folder))
        if path != folder / MANIFEST
    }
