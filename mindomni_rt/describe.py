"""What a checkpoint or bundle holds, as data and as lines for a reader."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from .bundle.manifest import Manifest, is_bundle, read_manifest
from .checkpoint.config import RecommendedConfig
from .checkpoint.headers import elements
from .checkpoint.layout import PARTS, Checkpoint, open_checkpoint
from .checkpoint.parse import own_config


def describe(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Raises BadCheckpointError or BadBundleError for what cannot be read."""
    if is_bundle(folder):
        return _bundle(folder, read_manifest(folder))
    return _checkpoint(open_checkpoint(folder))


def read_recommended(folder: Path) -> RecommendedConfig:
    """A model's own settings, without opening the rest of it. Raises BadCheckpointError or BadBundleError."""
    if is_bundle(folder):
        return read_manifest(folder).model.recommended
    found: RecommendedConfig = own_config(folder / "mindomni.json")["recommended"]
    return found


def _bundle(folder: Path, manifest: Manifest) -> tuple[dict[str, Any], list[str]]:
    targets = list(manifest.targets) or ["any device"]
    total = sum(entry.bytes for entry in manifest.files.values())
    data = {
        "path": str(folder),
        "kind": "bundle",
        "runtime": manifest.runtime,
        "runtime_version": manifest.runtime_version,
        "targets": targets,
        "dtype": manifest.dtype,
        "profile": manifest.profile.name,
        "bytes": total,
        "precision": {name: graph.precision for name, graph in manifest.graphs.items()},
        "built_by": dict(manifest.built_by),
        "recommended": asdict(manifest.model.recommended),
        "config": manifest.model.to_dict(),
    }
    lines = [
        f"bundle {folder}",
        f"  runs on    {manifest.runtime} {manifest.runtime_version}, {', '.join(targets)}",
        f"  computes   {manifest.dtype}, sizes {manifest.profile.name!r}, {total / 2**20:.1f} MiB",
        f"  recommends {manifest.model.recommended}",
    ]
    lines += [f"  {name:15} {graph.precision}" for name, graph in sorted(manifest.graphs.items())]
    return data, lines


def _checkpoint(checkpoint: Checkpoint) -> tuple[dict[str, Any], list[str]]:
    count = {part: sum(elements(e) for e in checkpoint.tensors[part].values()) for part in PARTS}
    kinds = {part: sorted({e.dtype for e in checkpoint.tensors[part].values()}) for part in PARTS}
    data = {
        "path": str(checkpoint.path),
        "kind": "checkpoint",
        "parameters": count,
        "dtypes": kinds,
        "recommended": asdict(checkpoint.config.recommended),
        "config": checkpoint.config.to_dict(),
    }
    lines = [f"checkpoint {checkpoint.path}"]
    lines += [f"  {part:10} {count[part]:>15,} parameters  {', '.join(kinds[part])}" for part in PARTS]
    lines.append(f"  {'total':10} {sum(count.values()):>15,} parameters")
    lines.append(f"  recommended: {checkpoint.config.recommended}")
    for title, names in (("computed", checkpoint.computed), ("unused", checkpoint.unused)):
        lines += [f"  {title}: {', '.join(names)}"] if names else []
    return data, lines
