"""Stages as ONNX graphs: small wrappers over the reference modules, traced by torch.onnx.

Each wrapper's `forward` takes the inputs of its contract (`mindomni_rt.bundle.contracts`) in order. What TensorRT and
onnxruntime both take, and no more: Attention with 4-D inputs and an additive mask in the model's own type (or none),
the KV cache updated by TensorScatter outside of it, rotary tables and masks from the host.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mindomni_rt.bundle.contracts import MASKED, OPSET, GraphSpec, graph_specs, resolve
from mindomni_rt.errors import BadRequestError
from mindomni_rt.kernels.onnx_function import attend_by_node
from mindomni_rt.model.attention import attention, segment_attention
from mindomni_rt.model.dtypes import DTYPES
from mindomni_rt.model.mindomni import MindOmniModel

from .store import fold_transposes, strip_notes


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask (True = may attend) as numbers to add to the scores.

    Shared boolean masks make TensorRT-RTX 1.7 fail in bfloat16; additive ones build in every type.
    """
    zero = torch.zeros((), dtype=dtype, device=visible.device)
    return torch.where(visible, zero, torch.full_like(zero, MASKED))


def cache_update(cache: Tensor, new: Tensor, start: Tensor) -> Tensor:
    """cache (1, H, capacity, D) with new (1, H, S, D) written from start (1,)."""
    if torch.onnx.is_in_onnx_export():
        return torch.onnx.ops.symbolic(
            "TensorScatter", (cache, new, start), {"axis": 2}, dtype=cache.dtype, shape=cache.shape, version=OPSET
        )
    place = start + torch.arange(new.shape[2], device=cache.device)
    return cache.index_copy(2, place, new)


class VisionGraph(nn.Module):
    """Patches and host-made tables -> image embeddings."""

    def __init__(self, model: MindOmniModel) -> None:
        super().__init__()
        self.tower = model.vision
        self.dtype = model.vision.patch_embed.proj.weight.dtype

    def forward(self, patches: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, places: Tensor, mask: Tensor) -> Tensor:
        return self.tower(patches.to(self.dtype), cos, sin, slots, places, additive(mask, self.dtype))


class LanguageGraph(nn.Module):
    """Prefill and decode in one: S new tokens over a static cache."""

    def __init__(self, model: MindOmniModel) -> None:
        super().__init__()
        self.language = model.language

    def forward(
        self,
        token_ids: Tensor,
        source: Tensor,
        image_embeds: Tensor,
        cos: Tensor,
        sin: Tensor,
        start: Tensor,
        scored: Tensor,
        *caches: Tensor,
    ) -> tuple[Tensor, ...]:
        layers = len(self.language.layers)
        keys, values = list(caches[:layers]), list(caches[layers:])
        embeds = self.language.embed_tokens(token_ids)
        # F.embedding is one Gather; index_select would reshape its index first.
        x = F.embedding(source, torch.cat([embeds[0], image_embeds])).unsqueeze(0)
        place = start + torch.arange(token_ids.shape[1], device=x.device)
        visible = torch.arange(keys[0].shape[2], device=x.device)[None] <= place[:, None]
        mask = additive(visible, x.dtype)[None, None]
        for index, layer in enumerate(self.language.layers):

            def attend(q: Tensor, k: Tensor, v: Tensor, index: int = index) -> Tensor:
                keys[index] = cache_update(keys[index], k, start)
                values[index] = cache_update(values[index], v, start)
                return attention(q, keys[index], values[index], mask=mask)

            x = layer(x, cos, sin, attend)
        logits = self.language.logits(F.embedding(scored, x[0])).float()
        return (logits, x, *keys, *values)


class ChooseGraph(nn.Module):
    """The best token under the repetition penalty, and the tokens seen with it."""

    def forward(self, logits: Tensor, seen: Tensor, penalty: Tensor) -> tuple[Tensor, Tensor]:
        penalized = torch.where(logits < 0, logits * penalty, logits / penalty)
        token = torch.where(seen > 0, penalized, logits).argmax(dim=-1, keepdim=True)
        places = torch.arange(logits.shape[1], device=logits.device)[None]
        return token, torch.where(places == token, torch.ones_like(seen), seen)


class ConnectorGraph(nn.Module):
    """Hidden states -> condition."""

    def __init__(self, model: MindOmniModel) -> None:
        super().__init__()
        self.connector = model.connector

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        linear, *blocks = self.connector
        x = linear(hidden)
        for block in blocks:
            x = block(x, cos, sin, lambda q, k, v: attention(q, k, v, causal=True))
        return x


class _PatchLinear(nn.Module):
    """A patch embedding's convolution as a Linear over patches in (row, column, channel) order."""

    def __init__(self, proj: nn.Conv2d) -> None:
        super().__init__()
        self.weight = nn.Parameter(proj.weight.permute(0, 2, 3, 1).flatten(1).contiguous(), requires_grad=False)
        self.bias = proj.bias

    def forward(self, patches: Tensor) -> Tensor:
        return F.linear(patches.to(self.weight.dtype), self.weight, self.bias)


class FeaturesGraph(nn.Module):
    """Latent patches of a reference image -> tokens of the condition."""

    def __init__(self, model: MindOmniModel) -> None:
        super().__init__()
        self.embed = _PatchLinear(model.decoder.input_x_embedder.proj)

    def forward(self, latents: Tensor, positions: Tensor) -> Tensor:
        return self.embed(latents) + positions


class PrefixGraph(nn.Module):
    """Condition and the times of a schedule -> K/V of both, and AdaLN's table."""

    def __init__(self, model: MindOmniModel) -> None:
        super().__init__()
        self.decoder = model.decoder

    def forward(
        self,
        condition: Tensor,
        features: Tensor,
        cos: Tensor,
        sin: Tensor,
        time_cos: Tensor,
        time_sin: Tensor,
        visible: Tensor,
    ) -> tuple[Tensor, ...]:
        length, steps = condition.shape[1], features.shape[0]
        features = features.to(condition.dtype)
        x = torch.cat([condition, self.decoder.time_token(features).unsqueeze(0)], dim=1)
        cos = torch.cat([cos, time_cos.expand(steps, -1)])
        sin = torch.cat([sin, time_sin.expand(steps, -1)])
        place = torch.arange(steps, device=x.device)
        # Condition tokens never see a time token; a time token sees the condition and itself.
        upper = torch.cat([visible, visible.new_zeros(length, steps)], dim=1)
        lower = torch.cat([visible.new_ones(steps, length), place[:, None] == place[None]], dim=1)
        mask = additive(torch.cat([upper, lower]), x.dtype)[None, None]
        keys: list[Tensor] = []
        values: list[Tensor] = []

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys.append(k)
            values.append(v)
            return attention(q, k, v, mask=mask)

        *inner, last = self.decoder.llm.layers
        for layer in inner:
            x = layer(x, cos, sin, attend)
        k, v = last.keys_values(x, cos, sin)  # type: ignore[operator]
        k, v = torch.stack([*keys, k]), torch.stack([*values, v])  # (layers, 1, H, L + T, D)
        times = [t[:, :, :, length:].permute(3, 0, 1, 2, 4).contiguous() for t in (k, v)]
        return k[:, :, :, :length], v[:, :, :, :length], *times, self.decoder.modulation(features)


class DenoiserGraph(nn.Module):
    """One step over image tokens. condition_only: without time_keys and time_values, keys are the condition's alone.

    node: leave attention as one node of our own domain (`kernels.onnx_function`), which TensorRT runs as our kernel.
    """

    def __init__(self, model: MindOmniModel, condition_only: bool = False, node: bool = False) -> None:
        super().__init__()
        self.decoder, self.condition_only, self.node = model.decoder, condition_only, node
        self.embed = _PatchLinear(model.decoder.x_embedder.proj)

    def forward(self, latents: Tensor, keys: Tensor, values: Tensor, *rest: Tensor) -> Tensor:
        *times, modulation, cos, sin, positions = rest
        x = self.embed(latents) + positions
        for index, layer in enumerate(self.decoder.llm.layers):

            def attend(q: Tensor, k: Tensor, v: Tensor, index: int = index) -> Tensor:
                segments = [(keys[index], values[index])]
                if not self.condition_only:
                    time_k, time_v = (t[index].unsqueeze(2) for t in times)
                    segments += [(time_k, time_v), (k, v)]
                    if self.node:
                        return attend_by_node(q, *segments)
                return segment_attention(q, segments)

            x = layer(x, cos, sin, attend)
        return self.decoder.final_layer(self.decoder.llm.norm(x), modulation).float()


class UpdateGraph(nn.Module):
    """Guidance and one step of the solver."""

    def forward(
        self,
        latents: Tensor,
        guided: Tensor,
        unguided: Tensor,
        previous: Tensor,
        scale: Tensor,
        weight: Tensor,
        previous_weight: Tensor,
    ) -> tuple[Tensor, Tensor]:
        velocity = unguided + scale * (guided - unguided)
        return latents + (weight * velocity + previous_weight * previous), velocity


class HalfAttention(nn.Module):
    """The VAE's attention with its matrix products in float16; their input is normalized, so it does not overflow."""

    def __init__(self, whole: Any) -> None:
        super().__init__()
        self.group_norm: nn.Module = whole.group_norm
        halves = [deepcopy(part).half() for part in (whole.to_q, whole.to_k, whole.to_v, whole.to_out[0])]
        self.to_q, self.to_k, self.to_v, self.to_out = halves[0], halves[1], halves[2], halves[3]

    def forward(self, x: Tensor) -> Tensor:
        h = self.group_norm(x).half().flatten(2).transpose(1, 2).unsqueeze(1)
        h = F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h))
        return x + self.to_out(h).float().squeeze(1).transpose(1, 2).reshape(x.shape)


def halve_attention(model: MindOmniModel) -> None:
    """Precision "mixed" of stage vae, in place: Turing has no float32 matrix products in TensorRT-RTX."""
    for part in (model.vae.encoder, model.vae.decoder):
        if part is not None:
            part.mid_block.attentions[0] = HalfAttention(part.mid_block.attentions[0])


class VAEGraph(nn.Module):
    """Latents, already unscaled, -> pixels in about [-1, 1]."""

    def __init__(self, model: MindOmniModel) -> None:
        super().__init__()
        self.vae = model.vae
        self.dtype = model.vae.post_quant_conv.weight.dtype

    def forward(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents.to(self.dtype), tile=None).float()


class VAEEncodeGraph(VAEGraph):
    """Pixels in [-1, 1] -> the mean of their latents, unscaled."""

    def forward(self, pixels: Tensor) -> Tensor:
        return self.vae.encode(pixels.to(self.dtype), tile=None)[0].float()


_WRAPPERS: dict[str, Callable[[MindOmniModel], nn.Module]] = {
    "vision": VisionGraph,
    "language": LanguageGraph,
    "choose": lambda model: ChooseGraph(),
    "connector": ConnectorGraph,
    "features": FeaturesGraph,
    "prefix": PrefixGraph,
    "denoiser": DenoiserGraph,
    "denoiser_first": lambda model: DenoiserGraph(model, condition_only=True),
    "update": lambda model: UpdateGraph(),
    "vae": VAEGraph,
    "vae_encode": VAEEncodeGraph,
}
# Sizes to trace with: all different, none 0 or 1, so that no two axes are taken for the same one.
_SAMPLE = {
    "sequence": 5,
    "capacity": 24,
    "scores": 2,
    "images": 3,
    "merged": 6,
    "windows": 3,
    "tokens": 7,
    "steps": 4,
    "image_tokens": 10,
    "batch": 2,
    "rows": 6,
    "columns": 4,
}


def available(model: MindOmniModel) -> list[str]:
    """Names of the graphs that the checkpoint has tensors for."""
    names = list(_WRAPPERS)
    if model.decoder.input_x_embedder is None:
        names.remove("features")
    if model.vae.encoder is None:
        names.remove("vae_encode")
    return names


def sample_inputs(spec: GraphSpec, dtype: str) -> tuple[Tensor, ...]:
    """Zeros of a contract's shapes and types, for tracing."""
    return tuple(
        torch.zeros(
            tuple(resolve(axis, _SAMPLE) for axis in t.axes),
            dtype={**DTYPES, "int64": torch.int64, "bool": torch.bool}[dtype if t.dtype == "model" else t.dtype],
        )
        for t in spec.inputs
    )


def wrapper_of(model: MindOmniModel, name: str, attention: str = "native") -> nn.Module:
    """A graph as a module over a model's own. Raises BadRequestError for one that the checkpoint has no tensors for."""
    if name not in available(model):
        raise BadRequestError(f"graph {name!r}: this checkpoint has {', '.join(available(model))}")
    if attention == "triton" and name == "denoiser":
        return DenoiserGraph(model, node=True).eval()
    return _WRAPPERS[name](model).eval()


def trace(model: MindOmniModel, name: str, dtype: str, attention: str = "native") -> ir.Model:
    """One graph without weights: initializers that are parameters of the model have names and no values.

    model: of fake parameters in the types that the graph computes in; call it in their FakeTensorMode. dtype: of the
    inputs. attention "triton" makes the denoiser's a function of our own domain.
    """
    spec = graph_specs(model.config)[name]
    wrapper = wrapper_of(model, name, attention)
    dynamic = tuple(
        {i: f"{t.name}_{i}" for i, axis in enumerate(t.axes) if isinstance(axis, str)} or None for t in spec.inputs
    )
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            wrapper,
            sample_inputs(spec, dtype),
            dynamo=True,
            opset_version=OPSET,
            input_names=[t.name for t in spec.inputs],
            output_names=[t.name for t in spec.outputs],
            dynamic_shapes=_shapes(wrapper, dynamic),
            optimize=False,
            verbose=False,
        )
        assert program is not None
        graph, weights = program.model.graph, wrapper.state_dict()
        fold_transposes(graph)  # first: the optimizer would fold small ones under names of its own
        for key, value in graph.initializers.items():
            if key.removesuffix(".T") in weights:
                value.const_value = None
        program.optimize()
    strip_notes(program.model)
    return program.model


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the tracer's notes on its own workings out of a user's terminal; its errors are exceptions."""
    names = ("torch.onnx", "torch._dynamo", "onnxscript", "onnx_ir")
    before = {name: logging.getLogger(name).level for name in names}
    notes = logging.getLogger("torch.__trace")  # whole graphs as text, for each step, to whoever listens
    listeners, notes.handlers = notes.handlers, []
    try:
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        notes.handlers = listeners
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def _shapes(wrapper: nn.Module, dynamic: tuple[dict[int, str] | None, ...]) -> tuple[Any, ...]:
    """Nests the entries of *args parameters as torch.export wants them."""
    parameters = list(inspect.signature(wrapper.forward).parameters.values())
    plain = sum(p.kind is not p.VAR_POSITIONAL for p in parameters)
    return dynamic if plain == len(parameters) else (*dynamic[:plain], dynamic[plain:])
