"""Writes a checkpoint of random weights tensor by tensor: the published layout, bfloat16, no torch, little memory."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...checkpoint.config import ModelConfig, StackConfig, published
from ...checkpoint.dump import SHARD_BYTES, config_files
from ...errors import BadRequestError
from ...files import replace_file
from .shapes import Shape, tensor_shapes
from .tokenizer import write_random_tokenizer

logger = logging.getLogger(__name__)
# Normal numbers that all tensors are cut from. A prime: rows of no matrix repeat after a whole block.
_BLOCK = 2**24 - 3
_STRIDE = 1_000_003  # from where one tensor begins in the block to where the next one does
_BIAS = 0.02
_README = """Random weights at the sizes of MindOmni's published model{cut}, with a tokenizer of letters.

It takes the time and memory of the real model and knows nothing: its words and pictures mean nothing.
"""


def cut(config: ModelConfig, layers: int | None = None, divide: int = 1) -> ModelConfig:
    """A configuration with at most `layers` layers in every stack and widths divided by `divide`.

    Heads keep their size, so the number of heads shrinks (to one at least); the vocabulary stays. Raises
    BadRequestError.
    """
    if divide < 1 or (layers is not None and layers < 1):
        raise BadRequestError(f"layers {layers}, divide {divide}: expected 1 or more")

    def stack(found: StackConfig) -> StackConfig:
        heads = max(found.num_heads // divide, 1)
        keys = next(k for k in range(max(found.num_kv_heads // divide, 1), 0, -1) if heads % k == 0)
        return replace(
            found,
            hidden_size=heads * found.head_dim,
            num_heads=heads,
            num_kv_heads=keys,
            intermediate_size=max(found.intermediate_size // divide // 16 * 16, 16),
            num_layers=min(found.num_layers, layers or found.num_layers),
        )

    vision = config.vision
    heads, depth = max(vision.num_heads // divide, 1), min(vision.num_layers, layers or vision.num_layers)
    language = stack(config.language.stack)
    widths = tuple(max(width // divide // 16 * 16, 16) for width in config.vae.block_out_channels)
    return replace(
        config,
        vision=replace(
            vision,
            hidden_size=heads * vision.head_dim,
            num_heads=heads,
            num_layers=depth,
            intermediate_size=max(vision.intermediate_size // divide // 4 * 4, 4),
            out_hidden_size=language.hidden_size,
            full_attention_layers=tuple(i for i in vision.full_attention_layers if i < depth) or (depth - 1,),
        ),
        language=replace(config.language, stack=language),
        connector=replace(config.connector, input_size=language.hidden_size, stack=stack(config.connector.stack)),
        decoder=replace(config.decoder, stack=stack(config.decoder.stack)),
        vae=replace(
            config.vae,
            block_out_channels=widths,
            norm_num_groups=min(config.vae.norm_num_groups, *(width & -width for width in widths)),
        ),
    )


@dataclass(frozen=True)
class Written:
    """What was written. bytes: of the weights."""

    folder: Path
    parameters: int
    bytes: int
    files: int


def write_random_checkpoint(
    folder: Path,
    config: ModelConfig | None = None,
    *,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int], object] = lambda count: None,
) -> Written:
    """A checkpoint of `config` (None: the published sizes) with random bfloat16 weights in an empty or new folder.

    Weights are normal numbers over the square root of their fan-in, norms are ones. progress takes the bytes written
    since its last call. Raises BadRequestError if the folder holds files or the disk is too small.
    """
    config = config or published()
    files = dict(_files(config, shard_bytes))
    total = weights_bytes(config)
    check_room(folder, total)
    for name, data in config_files(config).items():
        _write_text(folder / name, json.dumps(data, indent=2) + "\n")
    write_random_tokenizer(folder / "mllm", config.language)
    _write_text(folder / "README.md", _README.format(cut="" if config == published() else ", cut"))
    values, index = _Values(seed), 0
    for name, tensors in files.items():
        _write_tensors(folder / name, tensors, values, index, progress)
        index += len(tensors)
        logger.info("%s: %d tensors", folder / name, len(tensors))
    for name, data in _indices(files).items():
        _write_text(folder / name, json.dumps(data, indent=2) + "\n")
    return Written(folder, total // 2, total, len(files))


def weights_bytes(config: ModelConfig) -> int:
    """Of the weights that `write_random_checkpoint` writes."""
    return 2 * sum(prod(shape) for tensors in tensor_shapes(config).values() for shape in tensors.values())


def check_room(folder: Path, total: int) -> None:
    """Makes the folder. Raises BadRequestError where it holds files or its disk has not `total` bytes."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadRequestError(f"{folder} exists and is not an empty folder; choose another")
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < total:
        raise BadRequestError(
            f"the weights take {total / 1e9:.1f} GB, {free / 1e9:.1f} GB are free at {folder}; "
            "choose another disk or fewer layers"
        )


def _files(config: ModelConfig, shard_bytes: int) -> Iterator[tuple[str, dict[str, Shape]]]:
    """Each weights file of the published layout with the names and shapes of its tensors."""
    shapes = tensor_shapes(config)
    mllm = {f"visual.{name}": shape for name, shape in shapes["vision"].items()}
    for name, shape in shapes["language"].items():
        mllm[name if name.startswith("lm_head.") else f"model.{name}"] = shape
    for stem, tensors in (
        ("mllm/model", mllm),
        ("image_decoder/model", shapes["decoder"]),
        ("connector", shapes["connector"]),
        ("vae/diffusion_pytorch_model", shapes["vae"]),
    ):
        shards = list(_shards(tensors, shard_bytes))
        for number, shard in enumerate(shards, 1):
            part = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
            yield f"{stem}{part}.safetensors", shard


def _shards(tensors: Mapping[str, Shape], limit: int) -> Iterator[dict[str, Shape]]:
    shard: dict[str, Shape] = {}
    size = 0
    for name, shape in tensors.items():
        if shard and size + 2 * prod(shape) > limit:
            yield shard
            shard, size = {}, 0
        shard[name] = shape
        size += 2 * prod(shape)
    yield shard


def _indices(files: Mapping[str, Mapping[str, Shape]]) -> dict[str, dict[str, Any]]:
    """The index file of every set of shards."""
    found: dict[str, dict[str, Any]] = {}
    for name, tensors in files.items():
        stem, of, _ = name.partition("-00")
        if of:
            index = found.setdefault(
                f"{stem}.safetensors.index.json", {"metadata": {"total_size": 0}, "weight_map": {}}
            )
            index["metadata"]["total_size"] += 2 * sum(prod(shape) for shape in tensors.values())
            index["weight_map"].update(dict.fromkeys(tensors, Path(name).name))
    return found


class _Values:
    """Pieces of one block of normal numbers as bfloat16, rolled and scaled for each tensor."""

    def __init__(self, seed: int) -> None:
        self._normal = np.random.default_rng(seed).standard_normal(_BLOCK, dtype=np.float32)
        self._block = lru_cache(maxsize=8)(lambda scale: self._scaled(0, _BLOCK, scale))

    def _scaled(self, start: int, end: int, scale: float) -> NDArray[np.uint16]:
        return bfloat16(self._normal[start:end] * np.float32(scale))

    def pieces(self, name: str, shape: Shape, index: int) -> Iterator[NDArray[np.uint16]]:
        """The values of the index-th tensor in order, in pieces of at most a block."""
        left = prod(shape)
        if len(shape) == 1 and name.endswith(".weight"):  # of a norm
            yield np.full(left, bfloat16(np.ones(1, np.float32))[0])
            return
        scale = _BIAS if len(shape) == 1 else prod(shape[1:]) ** -0.5
        start = index * _STRIDE % _BLOCK
        whole = left > _BLOCK // 8  # below that, rounding a part is faster than keeping the whole block rounded
        while left:
            end = min(start + left, _BLOCK)
            yield self._block(scale)[start:end] if whole else self._scaled(start, end, scale)
            left -= end - start
            start = 0


def bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The upper halves of finite float32 numbers, rounded to nearest even, as bfloat16's bits."""
    bits = values.view(np.uint32)
    odd = bits >> 16
    odd &= 1
    odd += bits
    odd += 0x7FFF
    odd >>= 16
    return odd.astype(np.uint16)


def _write_tensors(
    path: Path, tensors: Mapping[str, Shape], values: _Values, first: int, progress: Callable[[int], object]
) -> None:
    """One safetensors file: the length of its header, the header as JSON, the data in order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors.items():
        begin, end = end, end + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format asks for data aligned to 8 bytes

    def data() -> Iterator[bytes | memoryview]:
        yield len(text).to_bytes(8, "little")
        yield text
        for index, (name, shape) in enumerate(tensors.items(), first):
            for piece in values.pieces(name, shape, index):
                yield piece.astype("<u2", copy=False).data
                progress(2 * len(piece))

    _write_whole(path, data())


def _write_text(path: Path, text: str) -> None:
    _write_whole(path, [text.encode()])


def _write_whole(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """`replace_file` with bytes in pieces, whose folder is made."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            for piece in pieces:
                file.write(piece)

    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, write)
