"""The models that are mutated, as bytes and as a folder whose files are hard-linked into each mutant's."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).parents[1]
BUNDLE = TESTS.parent / "assets" / "shapes-world-bundle"
PARITY = TESTS / "fixtures" / "parity"


@dataclass(frozen=True)
class Source:
    """A model: contents by relative path, and where they lie."""

    name: str
    files: dict[str, bytes]
    folder: Path

    @property
    def is_bundle(self) -> bool:
        return "manifest.json" in self.files


def make_sources(root: Path) -> dict[str, Source]:
    """The parity checkpoint in four layouts, and the bundle that is shipped."""
    makers: dict[str, Callable[[], dict[str, bytes]]] = {
        "checkpoint": _checkpoint,
        "sharded": _sharded,
        "pickled": _pickled,
        "slow tokenizer": _slow_tokenizer,
        "bundle": lambda: _read(BUNDLE),
    }
    sources = {}
    for name, make in makers.items():
        folder, files = root / name.replace(" ", "-"), make()
        for path, data in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)
        sources[name] = Source(name, files, folder)
    return sources


def _read(folder: Path, *left_out: str) -> dict[str, bytes]:
    names = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    return {name.as_posix(): (folder / name).read_bytes() for name in names if name.parts[0] not in left_out}


def _checkpoint() -> dict[str, bytes]:
    return _read(PARITY, "cases")


def _slow_tokenizer() -> dict[str, bytes]:
    files = _checkpoint()
    del files["mllm/tokenizer.json"]
    return files


def _sharded() -> dict[str, bytes]:
    from safetensors.numpy import load, save

    files = _checkpoint()
    tensors = load(files.pop("mllm/model.safetensors"))
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, chosen in shards.items():
        files[f"mllm/{file}"] = save({name: tensors[name] for name in chosen})
    where = {name: file for file, chosen in shards.items() for name in chosen}
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": where}
    files["mllm/model.safetensors.index.json"] = json.dumps(index).encode()
    return files


def _pickled() -> dict[str, bytes]:
    import torch
    from safetensors.torch import load

    files = _checkpoint()
    buffer = io.BytesIO()
    torch.save(load(files.pop("image_decoder/model.safetensors")), buffer)
    files["image_decoder/model.pt"] = buffer.getvalue()
    return files
