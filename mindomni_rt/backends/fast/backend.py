"""The fast path: the torch backend with our kernels, static buffers and CUDA graphs. Made for CUDA; runs anywhere.

The same code runs on a CPU without graphs and with the kernels' plain meanings, which is how it is tested.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...checkpoint.config import StackConfig
from ...checkpoint.layout import LoadReport
from ...errors import UnsupportedDeviceError
from ...inputs.images import ImagePatches
from ...inputs.positions import rope_tables, time_features
from ...memory.footprint import Precision
from ...memory.layers import PARTS
from ...memory.precision import stored
from ...model.attention import attention as plain_attention
from ...model.decoder import PrefixKV
from ...model.mindomni import MindOmniModel
from ...sampling.schedule import Solver, guide, within
from ..base import DenoiseRequest, LanguageRequest
from ..torch.backend import TorchBackend, TorchPrefix
from .attention import Attention, candidates, choose, eight_bit, ours
from .decode import DecodeState, FastLanguageRun
from .denoise import DenoiseLoop, Shape
from .graph import memory_of
from .linear import Dense, EightBit, Product, make_product
from .residency import Residency
from .stack import FastBlock, FastStack
from .step_cache import StepCache
from .tune import choose_eight_bit, choose_fused_rows, choose_one_row

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FastOptions:
    """How the fast path runs. impl: which kernels ("auto", "triton", "torch"); attention: "auto" measures, else one of
    `precision.ATTENTIONS`; resident: parts that stay on the device, None for all."""

    precision: Precision = field(default_factory=Precision)
    impl: str = "auto"
    attention: str = "auto"
    resident: tuple[str, ...] | None = None


class TorchCudaBackend(TorchBackend):
    """The six stages, fast. Takes the model's block weights over; see `FastStack`."""

    features = frozenset({"solver", "guidance_interval", "step_cache", "draft_tokens"})

    def __init__(
        self,
        model: MindOmniModel,
        device: str = "cuda",
        report: LoadReport | None = None,
        options: FastOptions | None = None,
    ) -> None:
        super().__init__(model, device, report)
        self.options = options or FastOptions(precision=Precision.uniform(self.dtype))
        kept, impl = stored(self.options.precision), self.options.impl
        language, decoder = model.language, model.decoder
        resident = PARTS if self.options.resident is None else self.options.resident

        def stack(config: StackConfig, blocks: torch.nn.ModuleList, part: str) -> FastStack:
            return FastStack(config, blocks, kept[part], impl, device, device if part in resident else None)

        self.language_stack = stack(self.config.language.stack, language.layers, "language")
        self.decoder_stack = stack(self.config.decoder.stack, decoder.llm.layers, "decoder")
        self._head = make_product(language.lm_head.weight.detach(), None, kept["head"], impl, device)
        language.lm_head = self._head  # type: ignore[assignment]  # called alike
        if self.options.precision.vae == "bfloat16":
            model.vae.to(torch.bfloat16).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.graph_pool = torch.cuda.graph_pool_handle() if device.startswith("cuda") else None
        self._loops: dict[Shape, DenoiseLoop] = {}
        self._state: DecodeState | None = None
        self._caches: dict[Shape, StepCache] = {}
        self._attention: dict[Shape, Attention] = {}
        self._tuned: set[str] = set()
        modules: dict[str, list[torch.nn.Module]] = {
            "vision": [model.vision],
            "language": [language, self.language_stack],
            "connector": [model.connector],
            "decoder": [decoder, self.decoder_stack],
            "vae": [model.vae],
        }
        self.residency = Residency(modules, device, resident, self._moved)

    def _moved(self, part: str) -> None:
        if part == "decoder":
            for loop in self._loops.values():
                loop.drop_graphs()
        if part == "language":
            self._state = None

    def vision(self, image: ImagePatches) -> Tensor:
        self.residency.need("vision")
        return super().vision(image)

    @torch.inference_mode()
    def connector(self, hidden: Tensor, image_latents: Sequence[tuple[int, Tensor]] = ()) -> Tensor:
        if image_latents:
            self.residency.need("decoder")
            patch = self.config.decoder.patch_size
            features = [
                (start, self._input_features(latents, latents.shape[-2] // patch, latents.shape[-1] // patch))
                for start, latents in image_latents
            ]
        self.residency.need("connector")
        condition = super().connector(hidden)
        for start, rows in features if image_latents else ():
            condition[:, start : start + rows.shape[1]] = rows
        return condition

    @torch.inference_mode()
    def _input_features(self, latents: Tensor, rows: int, columns: int) -> Tensor:
        return self.model.decoder.input_features(latents.to(self.torch_dtype), self._positions(rows, columns))

    def language(self, request: LanguageRequest) -> FastLanguageRun:  # type: ignore[override]
        self.residency.need("language")
        return FastLanguageRun(self, request)

    def decode_state(self, capacity: int) -> DecodeState:
        """Buffers for at least `capacity` tokens; the last ones are used again when they are large enough."""
        if self._state is None or self._state.capacity < capacity:
            self._state = None  # freed before the larger one is made
            self._state = DecodeState(self, capacity)
        if "language" not in self._tuned and self.device.startswith("cuda"):
            self._tuned.add("language")
            choose_one_row(p for p in (*_products(self.language_stack), self._head) if isinstance(p, Dense))
            choose_fused_rows(self.language_stack)
        return self._state

    def head(self, hidden: Tensor) -> Tensor:
        """Next-token scores (…, V) of pre-norm hidden states (…, C)."""
        return self.model.language.logits(hidden)

    @torch.inference_mode()
    def prefix(
        self,
        condition: Tensor,
        times: NDArray[np.float64],
        image_tokens: int,
        blocks: Sequence[tuple[int, int]] = (),
    ) -> TorchPrefix:
        with memory_of("prefix"):
            return self._prefix(condition, times, image_tokens, blocks)

    def _prefix(
        self, condition: Tensor, times: NDArray[np.float64], image_tokens: int, blocks: Sequence[tuple[int, int]]
    ) -> TorchPrefix:
        self.residency.need("decoder")
        decoder, fast, length = self.model.decoder, self.decoder_stack, condition.shape[1]
        stack, steps = self.config.decoder.stack, len(times)
        place = np.concatenate([np.arange(length), np.full(steps, length)])
        tables = rope_tables(stack.rope, stack.head_dim, place, length + 1 + image_tokens)
        cos, sin, features = self.tensors(*tables, time_features(times, self.config.decoder.time_frequencies))
        features = features.to(self.torch_dtype)
        rows = decoder.time_token(features).expand(condition.shape[0], -1, -1)
        x = torch.cat([condition, rows.to(condition.dtype)], dim=1)
        mask = decoder._prefix_mask(length, steps, blocks, x.device)
        layers = stack.num_layers
        shape = (layers, condition.shape[0], stack.num_kv_heads, length, stack.head_dim)
        keys, values = x.new_empty(shape), x.new_empty(shape)
        at_time = (steps, layers, condition.shape[0], stack.num_kv_heads, stack.head_dim)
        time_keys, time_values = x.new_empty(at_time), x.new_empty(at_time)

        def keep(layer: int, k: Tensor, v: Tensor) -> None:
            keys[layer], values[layer] = k[:, :, :length], v[:, :, :length]
            time_keys[:, layer] = k[:, :, length:].permute(2, 0, 1, 3)
            time_values[:, layer] = v[:, :, length:].permute(2, 0, 1, 3)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keep(layer, k, v)
            return plain_attention(q, k, v, mask=mask)

        rotate = fast.in_place(cos, sin)
        x = fast(x, rotate, attend, last=layers - 1)
        keep(layers - 1, *fast.keys_values(layers - 1, x, rotate))
        return TorchPrefix(PrefixKV(keys, values, time_keys, time_values), decoder.modulation(features))

    @torch.inference_mode()
    def denoiser(self, request: DenoiseRequest) -> Iterator[tuple[Tensor, Tensor]]:
        with memory_of("denoiser"):
            yield from self._denoise(request)

    def _denoise(self, request: DenoiseRequest) -> Iterator[tuple[Tensor, Tensor]]:
        self.residency.need("decoder")
        prefixes = [b for b in (request.guided, request.unguided) if isinstance(b, TorchPrefix)]
        kept = [p.kv for p in prefixes]
        loop = self._loop(kept, request.latents)
        solver = Solver(request.solver)
        cache = self._step_cache(loop, request.step_cache) if request.step_cache > 0 else None
        branches_before = 0
        steps = len(request.times) - 1
        for step, (now, following) in enumerate(zip(request.times[:-1], request.times[1:], strict=True)):
            if request.cancelled():
                return
            self.residency.need("decoder")  # a preview may have sent it away
            branches = len(prefixes) if within(float(now), request.guidance_interval) else 1
            if branches != branches_before:
                solver.forget()
            branches_before = branches
            loop.at_step(kept, prefixes[0].modulation[step], step)
            quirk = step == 0 and request.first_step == "condition_only"
            if cache is not None:
                velocities = cache.velocity(branches, not quirk, edge=step in (0, steps - 1))
            else:
                velocities = loop.velocity(branches, not quirk)
            velocity = velocities[0]
            if branches == 2:
                velocity = guide(velocities[0], velocities[1], request.guidance_scale)
            length = float(following - now)
            loop.latents += length * solver.direction(velocity, length)
            yield loop.latents.clone(), velocity.clone()
        if cache is not None:
            logger.info("step cache: %d of %d steps used it", cache.reused, steps)

    def _loop(self, prefixes: list[PrefixKV], latents: NDArray[np.float32]) -> DenoiseLoop:
        lengths = tuple(p.length for p in prefixes)
        shape = Shape.of(lengths, latents.shape)
        if shape not in self._loops:
            self._loops.clear()  # one set of buffers at a time
            self._caches.clear()
            self._loops[shape] = DenoiseLoop(
                self.model.decoder,
                self.decoder_stack,
                shape,
                self._fixed_attention(),
                self.torch_dtype,
                self.device,
                self.graph_pool,
            )
        loop = self._loops[shape]
        loop.load(prefixes, latents)
        if "decoder" not in self._tuned and self.device.startswith("cuda"):
            self._tuned.add("decoder")
            rows = shape.branches * shape.images * loop.tokens
            choose_eight_bit((p for p in _products(self.decoder_stack) if isinstance(p, EightBit)), rows)
        if self.options.attention == "auto" and self.device.startswith("cuda"):
            if shape not in self._attention:
                self._attention[shape] = self._measured_attention(loop)
            loop.use_attention(self._attention[shape])
        return loop

    def _step_cache(self, loop: DenoiseLoop, threshold: float) -> StepCache:
        if loop.shape not in self._caches:
            self._caches[loop.shape] = StepCache(loop)
        cache = self._caches[loop.shape]
        cache.begin(threshold)
        return cache

    def _fixed_attention(self) -> Attention:
        wanted, impl = self.options.attention, self.options.impl
        if wanted == "int8":
            capable = torch.cuda.is_available() and torch.cuda.get_device_capability(self.device) >= (8, 9)
            return eight_bit(impl, "fp8" if capable else "16bit")
        if wanted in ("auto", "segment"):  # on CUDA "auto" measures once the buffers are there
            return ours(impl)
        tried = candidates(torch.device(self.device), self.config.decoder.stack.head_dim, impl)
        if wanted not in tried:
            raise UnsupportedDeviceError(f"attention {wanted!r} does not run on {self.device}; use 'auto'")
        return tried[wanted]

    def _measured_attention(self, loop: DenoiseLoop) -> Attention:
        """The fastest of the candidates on one layer's shapes, with random queries, keys and values."""
        stack = self.config.decoder.stack
        rows = loop.shape.branches * loop.shape.images
        generator = torch.Generator(self.device).manual_seed(0)
        q, k, v = (
            torch.randn(
                rows,
                heads,
                loop.tokens,
                stack.head_dim,
                dtype=self.torch_dtype,
                device=self.device,
                generator=generator,
            )
            for heads in (stack.num_heads, stack.num_kv_heads, stack.num_kv_heads)
        )
        tried = candidates(torch.device(self.device), stack.head_dim, self.options.impl)
        return tried[choose(tried, q, k, v, loop.segments(0, loop.shape.branches, True))]

    def vae(self, latents: Tensor) -> NDArray[np.float32]:
        self.residency.need("vae")
        return super().vae(latents)

    def vae_encode(self, pixels: NDArray[np.float32]) -> Tensor:
        self.residency.need("vae")
        return super().vae_encode(pixels)


def _products(stack: FastStack) -> Iterator[Product]:
    for block in stack.blocks:
        assert isinstance(block, FastBlock)
        yield from block.products()
