"""Graphs traced without weights, and kept: the same trace serves every checkpoint of a configuration in one type.

Parameters are fake tensors while torch.onnx traces, so tracing the published model takes as much memory as tracing a
small one. A trace is an ONNX file whose weights are named and lie nowhere; `weights_of` fills them from a checkpoint's
mapped tensors, one at a time, as the bundle's data file is written.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mindomni_rt.bundle.contracts import graph_specs
from mindomni_rt.checkpoint.config import ModelConfig
from mindomni_rt.files import replace_file
from mindomni_rt.model.dtypes import DTYPES
from mindomni_rt.model.mindomni import MindOmniModel
from mindomni_rt.stages import PARTS

from .cache import TRACING, key_of
from .graphs import halve_attention, trace, wrapper_of
from .layers import UnlikeLayersError, layers_of, lengthen, shortened
from .pages import give_back
from .store import name_axes

logger = logging.getLogger(__name__)
_NOWHERE = "weights"  # the data file that a trace names and that does not exist


class Traces:
    """Traces of one model in one type. folder: where they are kept; None: each is made anew.

    model: decides shapes and which parts exist; its values are not read.
    """

    def __init__(
        self, model: MindOmniModel, dtype: str, vae: str, attention: str = "native", folder: Path | None = None
    ) -> None:
        self._model, self._dtype, self._vae, self._attention, self._folder = model, dtype, vae, attention, folder

    def get(self, name: str) -> tuple[ir.Model, float]:
        """A graph with its weights left out, and the seconds that tracing took, 0 if it was kept."""
        kept = None if self._folder is None else self._folder / f"{self._key(name)}.onnx"
        if kept is not None and kept.is_file():
            logger.info("%s: trace taken from %s", name, kept)
            return ir.load(kept), 0.0
        began = time.perf_counter()
        made = self._trace(name)
        for value in made.graph.initializers.values():
            if value.const_value is None:
                value.const_value = _nowhere(value)
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            replace_file(kept, lambda temporary: ir.save(made, temporary, format="protobuf"))
        return made, time.perf_counter() - began

    def _trace(self, name: str) -> ir.Model:
        """A graph, traced with few layers and lengthened where its layers are alike."""
        whole = self._model.config
        spec, config = graph_specs(whole)[name], shortened(whole, name)
        made = self._of(config, name)
        if config is not whole:
            try:
                lengthen(made, spec, layers_of(whole, name))
            except UnlikeLayersError as error:
                logger.warning("%s; it is traced whole, which takes longer", error)
                made = self._of(whole, name)
        name_axes(made, spec)
        return made

    def _of(self, config: ModelConfig, name: str) -> ir.Model:
        with _without_collections(), FakeTensorMode():
            fake = _without_weights(self._model, config, DTYPES[self._dtype], self._vae)
            return trace(fake, name, self._dtype, self._attention)

    def _key(self, name: str) -> str:
        config = self._model.config.to_dict()
        return key_of(
            {
                "graph": name,
                "model": {part: config[part] for part in PARTS},  # settings of requests change no graph
                "dtype": self._dtype,
                "vae": self._vae if name.startswith("vae") else "",
                "attention": self._attention if name == "denoiser" else "",
            },
            TRACING,
        )


@contextmanager
def _without_collections() -> Iterator[None]:
    """Tracing makes millions of objects that live to its end; looking for cycles in them costs a tenth of its time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _without_weights(model: MindOmniModel, config: ModelConfig, dtype: torch.dtype, vae: str) -> MindOmniModel:
    """A model with fake tensors for parameters. vae: "mixed" or the short name of a type."""
    with torch.device("meta"):
        fake = MindOmniModel(config)
    kinds = {name: _VAE[vae] if name.startswith("vae.") else dtype for name, _ in fake.named_parameters()}
    state = {name: torch.empty(p.shape, dtype=kinds[name]) for name, p in fake.named_parameters()}
    fake.load_state_dict(state, strict=False, assign=True)
    if model.language.lm_head.weight is model.language.embed_tokens.weight:
        fake.language.lm_head.weight = fake.language.embed_tokens.weight
    if vae == "mixed":
        halve_attention(fake)
    return fake.eval().requires_grad_(False)


_VAE = {"mixed": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def _nowhere(value: ir.Value) -> ir.ExternalTensor:
    assert value.dtype is not None and value.shape is not None, value.name
    size = value.dtype.itemsize * int(torch.Size(value.shape.numpy()).numel())
    return ir.ExternalTensor(_NOWHERE, 0, int(size), value.dtype, shape=value.shape, name=str(value.name), base_dir="")


def fill(traced: ir.Model, model: MindOmniModel, name: str) -> None:
    """Gives a trace the weights of a checkpoint, by reference: each is read and cast when it is written.

    model: in its stored type, mapped to its files.
    """
    weights, read = wrapper_of(model, name).state_dict(), _Reader()
    for key, value in traced.graph.initializers.items():
        found = value.const_value
        if isinstance(found, ir.ExternalTensor) and found.location == _NOWHERE:
            value.const_value = _lazy(weights, str(key), value, read)


class _Reader:
    """Reads weights one after another; the pages of the one before are given back."""

    def __init__(self) -> None:
        self._last: Tensor | None = None

    def __call__(self, source: Tensor, dtype: torch.dtype, turned: bool) -> Tensor:
        if self._last is not None:
            give_back(self._last)
        self._last = source
        found = source.to(dtype)
        return found.T if turned else found.contiguous()


def _lazy(weights: Mapping[str, Tensor], key: str, value: ir.Value, read: _Reader) -> ir.LazyTensor:
    source, turned = (weights[key], False) if key in weights else (weights[key.removesuffix(".T")], True)
    assert value.dtype is not None and value.shape is not None
    shape = tuple(value.shape.numpy())
    assert shape == tuple(source.shape[::-1] if turned else source.shape), (key, shape, source.shape)
    kind = _TORCH[value.dtype]

    return ir.LazyTensor(
        lambda: ir.tensor(read(source.detach(), kind, turned), name=key),
        dtype=value.dtype,
        shape=ir.Shape(shape),
        name=key,
    )


_TORCH: dict[Any, torch.dtype] = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
}
