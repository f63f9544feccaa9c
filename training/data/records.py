"""Where records come from: JSON lines, YAML lists of such files, webdataset shards, or the synthetic world.

A YAML file: {datasets: [{json_path: …, image_dir: …}]}. Image paths of a JSON line are relative to `image_root`, or to
the file. A stream is infinite and in a fixed order that its seed decides, so its position is one number.
"""

from __future__ import annotations

from pathlib import Path

from ..config import DataConfig
from ..errors import BadDataError
from .lines import LineStream
from .record import Record, Stream
from .shards import ShardStream
from .world.sources import WorldStream

__all__ = ["BadDataError", "Record", "Stream", "open_stream"]


def open_stream(config: DataConfig, stage: str, seed: int) -> Stream:
    """The stream of a stage's configuration. Raises BadDataError."""
    if config.source == "world":
        return WorldStream(config.split or stage, seed)
    if config.source == "webdataset":
        for shard in config.paths:
            if "://" not in shard and not Path(shard).is_file():
                raise BadDataError(f"{shard}: no such shard")
        return ShardStream(config.paths, seed, config.shuffle)
    files: list[tuple[Path, Path]] = []
    for name in config.paths:
        path = Path(name)
        root = Path(config.image_root) if config.image_root else path.parent
        files += _listed(path) if path.suffix in (".yaml", ".yml") else [(path, root)]
    return LineStream(files, seed)


def _listed(path: Path) -> list[tuple[Path, Path]]:
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        entries = data if isinstance(data, list) else data["datasets"]
        return [
            (path.parent / e["json_path"], path.parent / e.get("image_dir", Path(e["json_path"]).parent))
            for e in entries
        ]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise BadDataError(
            f"{path}: expected {{datasets: [{{json_path: …, image_dir: …}}]}} ({type(error).__name__}: {error})"
        ) from error
