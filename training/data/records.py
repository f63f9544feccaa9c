"""Where records come from: JSON lines, YAML lists of such files, webdataset shards, or the synthetic world.

A YAML file: {datasets: [{json_path: …, image_dir: …}]}. Image paths of a JSON line are relative to `image_root`, or to
the file. A stream is infinite and in a fixed order that its seed decides, so its position is one number.
"""

from __future__ import annotations

import re
from glob import glob
from pathlib import Path

from mindomni_rt.files import is_regular, read_text, why

from ..config import DataConfig
from ..errors import BadDataError
from .lines import LineStream
from .record import Stream
from .shards import ShardStream, is_address
from .world.sources import WorldStream

_MOST_FILES = 1_000_000  # of one pattern


def open_stream(config: DataConfig, stage: str, seed: int) -> Stream:
    """The stream of a stage's configuration. Raises BadDataError."""
    if config.source == "world":
        return WorldStream(config.split or stage, seed)
    paths = [found for pattern in config.paths for found in expanded(pattern)]
    if config.source == "webdataset":
        for shard in paths:
            if not is_address(shard) and not is_regular(Path(shard)):
                raise BadDataError(f"{shard}: no such shard")
        return ShardStream(paths, seed, config.shuffle)
    files: list[tuple[Path, Path]] = []
    for name in paths:
        path = Path(name)
        root = Path(config.image_root) if config.image_root else path.parent
        files += _listed(path) if path.suffix in (".yaml", ".yml") else [(path, root)]
    return LineStream(files, seed)


def expanded(pattern: str) -> list[str]:
    """The paths of a pattern with ranges ("{000..127}") and wildcards ("*", "?"), in order.

    Raises BadDataError where wildcards match nothing.
    """
    span = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if span:
        first, last = span.groups()
        if len(last) > len(str(_MOST_FILES)) or int(last) - int(first) >= _MOST_FILES:
            raise BadDataError(f"data.paths: {span[0]} in {pattern}: expected at most {_MOST_FILES} files")
        names = [f"{n:0{len(first)}}" for n in range(int(first), int(last) + 1)]
        return [p for n in names for p in expanded(pattern[: span.start()] + n + pattern[span.end() :])]
    if "://" in pattern or not re.search(r"[*?]", pattern) or is_regular(Path(pattern)):
        return [pattern]
    found = sorted(glob(pattern, recursive=True))  # noqa: PTH207  the pattern may be absolute
    if not found:
        raise BadDataError(f"data.paths: no file matches {pattern}")
    return found


def _listed(path: Path) -> list[tuple[Path, Path]]:
    import yaml

    try:
        data = yaml.safe_load(read_text(path))
        entries = data if isinstance(data, list) else data["datasets"]
        return [
            (path.parent / e["json_path"], path.parent / e.get("image_dir", Path(e["json_path"]).parent))
            for e in entries
        ]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise BadDataError(
            f"{path}: expected {{datasets: [{{json_path: …, image_dir: …}}]}} ({type(error).__name__}: {why(error)})"
        ) from error
