"""Which tensors lie in which file: headers of safetensors and .pt files, and the index of a sharded checkpoint."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from ..checks import shown
from ..errors import BadCheckpointError, MissingExtraError
from ..files import require_regular
from .json_files import read_json
from .pickled import read_pickled_header


@dataclass(frozen=True)
class TensorEntry:
    """One stored tensor: file, its name there, dtype as safetensors spells it ("BF16"), shape."""

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]


def read_index(folder: Path, stem: str) -> list[TensorEntry]:
    """Entries of a sharded or single file; the index, when there is one, must agree with its shards."""
    index = folder / f"{stem}.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise BadCheckpointError(f"{index}: expected a weight_map of tensor names to files")
        for name in weight_map.values():
            if (
                not isinstance(name, str)
                or not name.endswith(".safetensors")
                or len(name) > 200
                or set(name) & {*"/\\"}
            ):
                raise BadCheckpointError(
                    f"{index}: shard names must be plain file names that end in .safetensors, found {shown(name)}"
                )
        entries = [e for name in sorted(set(weight_map.values())) for e in read_headers(folder / name)]
        missing = sorted(set(weight_map) - {e.key for e in entries})
        if missing:
            raise BadCheckpointError(
                f"{index} promises tensor {missing[0]} in {weight_map[missing[0]]}; it is not there"
            )
        return entries
    single = folder / f"{stem}.safetensors"
    if single.exists():
        return read_headers(single)
    pickled = folder / "model.pt"
    if pickled.exists():
        return [TensorEntry(pickled, k, dtype, shape) for k, (dtype, shape) in read_pickled_header(pickled).items()]
    raise BadCheckpointError(f"{folder}: expected {stem}.safetensors or {stem}.safetensors.index.json with its shards")


def read_headers(path: Path) -> list[TensorEntry]:
    """Entries of one safetensors file."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise MissingExtraError("safetensors", "torch") from error
    try:
        size = require_regular(path)
    except FileNotFoundError as error:
        raise BadCheckpointError(f"{path} is missing") from error
    except OSError as error:
        raise BadCheckpointError(f"{path}: {error.strerror or error}") from error
    try:
        with safe_open(path, framework="np") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 safe_open is no dict
            return [TensorEntry(path, k, s.get_dtype(), tuple(s.get_shape())) for k, s in slices.items()]
    except (SafetensorError, OSError) as error:
        raise BadCheckpointError(
            f"{path} is not a whole safetensors file ({error}); {size} bytes found: download it again"
        ) from error


def elements(entry: TensorEntry) -> int:
    """How many numbers a tensor holds."""
    return math.prod(entry.shape)
