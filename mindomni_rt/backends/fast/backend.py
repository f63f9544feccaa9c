"""The fast path: the torch backend with our kernels, static buffers and CUDA graphs. Made for CUDA; runs anywhere.

The same code runs on a CPU, without graphs and on the kernels' reference implementations, which is how it is tested.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from weakref import WeakSet, proxy

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...checkpoint.config import StackConfig
from ...checkpoint.layout import LoadReport
from ...errors import UnsupportedDeviceError
from ...inputs.images import ImagePatches
from ...memory.footprint import Precision, capacity
from ...memory.layers import PARTS, Workload
from ...memory.planner import BESIDE, Plan, blocks_ahead
from ...memory.precision import stored
from ...model.decoder import PrefixKV
from ...model.mindomni import MindOmniModel
from ..base import OPTIONAL, DenoiseRequest, LanguageRequest
from ..torch.backend import TorchBackend, TorchPrefix
from ..torch.device import is_cuda, limit_memory, on_device, with_index
from .attention import Attention, candidates, choose, eight_bit, named, ours, unplanned
from .buffers import Shape, StepBuffers
from .denoise import FastDenoiseSession
from .graph import GraphPool, memory_of
from .language import DecodeState, FastLanguageSession
from .linear import Linear, LinearDense, LinearW8A8, PatchLinear, make_linear
from .picture_norm import lay_channels_last
from .prefix import FastPrefix
from .residency import Residency
from .stack import FastBlock, FastStack
from .step_cache import StepCache
from .tune import choose_fused_rows, choose_one_row, choose_w8a8

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FastOptions:
    """How the fast path runs. impl: which kernels ("auto", "triton", "torch"); attention: "auto" measures, else one of
    `precision.ATTENTIONS`; resident: parts that stay on the device, None for the plan's, without one all; plan: its
    budget may have room for blocks of the decoder while text is written; limited: a budget limits the memory of this
    process, until `close`."""

    precision: Precision = field(default_factory=Precision)
    impl: str = "auto"
    attention: str = "auto"
    resident: tuple[str, ...] | None = None
    plan: Plan | None = None
    limited: bool = False

    @property
    def kept(self) -> tuple[str, ...]:
        """Parts that stay on the device."""
        if self.resident is not None:
            return self.resident
        return self.plan.resident if self.plan else PARTS


class TorchCudaBackend(TorchBackend):
    """The six stages, fast. Replaces the model's blocks by `FastStack`s, which take their weights."""

    capabilities = frozenset(OPTIONAL)

    def __init__(
        self,
        model: MindOmniModel,
        device: str = "cuda",
        report: LoadReport | None = None,
        options: FastOptions | None = None,
    ) -> None:
        device = with_index(device)
        super().__init__(model, device, report)
        self.options = options or FastOptions(precision=Precision.uniform(self.dtype))
        kept, impl = stored(self.options.precision), self.options.impl
        language, decoder = model.language, model.decoder
        resident = self.options.kept

        def stack(config: StackConfig, blocks: torch.nn.ModuleList, part: str) -> FastStack:
            return FastStack(config, blocks, kept[part], impl, device, device if part in resident else None)

        self.language_stack = stack(self.config.language.stack, language.layers, "language")
        self.decoder_stack = stack(self.config.decoder.stack, decoder.llm.layers, "decoder")
        self.head = make_linear(language.lm_head.weight.detach(), None, kept["head"], impl, device)
        # Each takes the place of a module that is called alike.
        language.layers, decoder.llm.layers = self.language_stack, self.decoder_stack  # type: ignore[assignment]
        language.lm_head = self.head  # type: ignore[assignment]
        for name in ("x_embedder", "input_x_embedder"):
            setattr(decoder, name, PatchLinear(getattr(decoder, name).proj))
        if self.options.precision.vae == "bfloat16":
            lay_channels_last(model.vae.to(torch.bfloat16), impl)
        # Apart, so that a token's graph does not hold what the graphs of a large image took.
        self.language_pool, self.step_pool = (GraphPool(impl != "torch") for _ in range(2))
        # The reference implementations are what is asked for: nothing to choose.
        self._tunes = is_cuda(device) and impl != "torch"
        self._buffers: dict[Shape, StepBuffers] = {}
        self._prefixes: WeakSet[FastPrefix] = WeakSet()
        self._state: DecodeState | None = None
        self._caches: dict[Shape, StepCache] = {}
        self._attention: dict[Shape, Attention] = {}
        self._tuned: set[str] = set()
        modules: dict[str, list[torch.nn.Module]] = {
            "vision": [model.vision],
            "language": [language],
            "connector": [model.connector],
            "decoder": [decoder],
            "vae": [model.vae],
        }
        # A backend that is dropped goes at once, with its weights: what it owns does not own it.
        own = proxy(self)
        self.residency = Residency(modules, device, resident, lambda part: own._moved(part))

    def _moved(self, part: str) -> None:
        """What plans count with a part goes with it. A session that runs keeps its buffers and captures anew."""
        if part == "decoder":
            self._drop_buffers()
        if part == "language":
            self._drop_state()

    def _drop_buffers(self) -> None:
        for buffers in self._buffers.values():
            buffers.drop_graphs()
        self._buffers.clear()
        self._caches.clear()

    def _drop_state(self) -> None:
        if self._state is not None:
            self._state.drop_graphs()
        self._state = None

    def kept(self) -> dict[str, Workload]:
        """By stage, sizes of a request for which the buffers that are there would be made."""
        found = {}
        if self._state is not None:
            found["language"] = Workload(prompt_tokens=self._state.capacity - 1, new_tokens=0, max_new_tokens=1)
        for shape, buffers in self._buffers.items():
            scale = self.config.vae.downscale
            found["denoiser"] = Workload(
                prompt_tokens=buffers.capacity, new_tokens=0, height=scale * shape.height, width=scale * shape.width,
                images=shape.images, guidance=shape.branches > 1,
            )  # fmt: skip
        return found

    def release(self) -> None:
        """Frees the buffers of earlier requests, and their graphs."""
        self._drop_buffers()
        self._drop_state()

    def _between(self) -> None:
        """A request begins: prefixes that are kept for later ones make room."""
        for prefix in self._prefixes:
            prefix.to_host()

    @on_device
    def vision(self, image: ImagePatches) -> Tensor:
        self._between()
        self.residency.need("vision")
        with unplanned():
            return super().vision(image)

    @on_device
    @torch.inference_mode()
    def connector(self, hidden: Tensor, image_latents: Sequence[tuple[int, Tensor]] = ()) -> Tensor:
        if image_latents:
            self._need_decoder()
        features = [(start, self.input_features(latents)) for start, latents in image_latents]
        self.residency.need("connector")
        with unplanned():
            condition = super().connector(hidden)
        for start, rows in features:
            condition[:, start : start + rows.shape[1]] = rows
        return condition

    @on_device
    def language(self, request: LanguageRequest) -> FastLanguageSession:
        self._between()
        # A guess may reach past the last token wanted.
        needed = len(request.token_ids) + max(request.max_new_tokens, 1) + request.draft_tokens
        blocks = list(self.decoder_stack.blocks)[: self._blocks_ahead(request, needed)]
        self.residency.hold(blocks)  # a text that was cancelled may have left more
        self.residency.need("language")
        state = self._decode_state(needed)
        if not request.paints or not blocks:
            return FastLanguageSession(state, request)
        return FastLanguageSession(state, request, lambda: self.residency.bring("decoder", blocks, BESIDE))

    def _blocks_ahead(self, request: LanguageRequest, needed: int) -> int:
        """Blocks of the decoder that the budget has room for beside this text and buffers for this many tokens."""
        if self.options.plan is None:
            return 0
        room = max(capacity(needed), self._state.capacity if self._state else 0)
        embeds, prompt = request.image_embeds, len(request.token_ids)
        patches = (0, 0) if embeds is None else (2, 2 * len(embeds))  # as many as these were merged from
        work = Workload(
            prompt_tokens=prompt, new_tokens=room - prompt, max_new_tokens=0, patches=patches, joint=True
        )  # fmt: skip
        return blocks_ahead(self.config, work, self.options.plan)

    def _decode_state(self, needed: int) -> DecodeState:
        """Buffers for this many tokens or more: they grow and never shrink, so that graphs over them serve on."""
        if self._state is None or self._state.capacity < needed:
            self._drop_state()  # freed before the larger one is made
            room = capacity(needed)
            self._state = DecodeState(self.model.language, self.language_stack, room, self.device, self.language_pool)
        if "language" not in self._tuned and self._tunes:
            self._tuned.add("language")
            choose_one_row(p for p in (*_linears(self.language_stack), self.head) if isinstance(p, LinearDense))
            choose_fused_rows(self.language_stack)
        return self._state

    @on_device
    @torch.inference_mode()
    def prefix(
        self,
        condition: Tensor,
        times: NDArray[np.float64],
        image_tokens: int,
        blocks: Sequence[tuple[int, int]] = (),
    ) -> TorchPrefix:
        self._need_decoder()
        with memory_of("prefix"), unplanned():
            made = super().prefix(condition, times, image_tokens, blocks)
        prefix = FastPrefix(made.kv, made.modulation)
        self._prefixes.add(prefix)
        return prefix

    def prefix_kv(self, condition: Tensor, features: Tensor, cos: Tensor, sin: Tensor, visible: Tensor) -> PrefixKV:
        """K and V of each layer are copied as they come: joined at the end they would be there twice."""
        stack, length, steps = self.config.decoder.stack, condition.shape[1], features.shape[0]
        shape = (stack.num_layers, condition.shape[0], stack.num_kv_heads, length, stack.head_dim)
        keys, values = condition.new_empty(shape), condition.new_empty(shape)
        at_time = (steps, *shape[:3], stack.head_dim)
        time_keys, time_values = condition.new_empty(at_time), condition.new_empty(at_time)

        def keep(layer: int, k: Tensor, v: Tensor) -> None:
            keys[layer], values[layer] = k[:, :, :length], v[:, :, :length]
            time_keys[:, layer] = k[:, :, length:].permute(2, 0, 1, 3)
            time_values[:, layer] = v[:, :, length:].permute(2, 0, 1, 3)

        self.model.decoder.prefix_pass(condition, features, cos, sin, visible, keep)
        return PrefixKV(keys, values, time_keys, time_values)

    @on_device
    @torch.inference_mode()
    def denoiser(self, request: DenoiseRequest) -> FastDenoiseSession:
        self._need_decoder()
        prefixes = [p for p in request.prefixes() if isinstance(p, FastPrefix)]
        with memory_of("denoiser"):
            buffers = self._filled([p.kv for p in prefixes], request.latents)
            cache = self._step_cache(buffers, request.step_cache) if request.step_cache > 0 else None
        return FastDenoiseSession(buffers, prefixes, self._need_decoder, cache)

    def _need_decoder(self) -> None:
        self.residency.need("decoder")

    def _filled(self, prefixes: list[PrefixKV], latents: NDArray[np.float32]) -> StepBuffers:
        """Buffers for these shapes, the last ones where they fit, holding the prefixes and the noise."""
        longest = max(p.length for p in prefixes)
        shape = Shape(len(prefixes), latents.shape[0], latents.shape[2], latents.shape[3])
        if shape not in self._buffers or self._buffers[shape].capacity < longest:
            self._drop_buffers()  # one set of buffers at a time
            self._buffers[shape] = StepBuffers(
                self.model.decoder,
                self.decoder_stack,
                shape,
                capacity(longest),
                self._fixed_attention(),
                self.torch_dtype,
                self.device,
                self.step_pool,
            )
        buffers = self._buffers[shape]
        buffers.load(prefixes, latents)
        if "decoder" not in self._tuned and self._tunes:
            self._tuned.add("decoder")
            rows = shape.branches * shape.images * buffers.tokens
            choose_w8a8((p for p in _linears(self.decoder_stack) if isinstance(p, LinearW8A8)), rows)
        if self.options.attention == "auto" and self._tunes:
            if shape not in self._attention:
                self._attention[shape] = self._measured_attention(buffers)
            buffers.use_attention(self._attention[shape])
        return buffers

    def _step_cache(self, buffers: StepBuffers, threshold: float) -> StepCache:
        if buffers.shape not in self._caches:
            self._caches[buffers.shape] = StepCache(buffers)
        cache = self._caches[buffers.shape]
        cache.begin(threshold)
        return cache

    def _fixed_attention(self) -> Attention:
        wanted, impl = self.options.attention, self.options.impl
        if wanted == "int8":
            capable = torch.cuda.is_available() and torch.cuda.get_device_capability(self.device) >= (8, 9)
            return eight_bit(impl, "fp8" if capable else "16bit")
        if wanted in ("auto", "segment"):  # on CUDA "auto" measures once the buffers are there
            return ours(impl)
        tried = named(torch.device(self.device), self.config.decoder.stack.head_dim, impl)
        if wanted not in tried:
            raise UnsupportedDeviceError(f"attention {wanted!r} does not run on {self.device}; use 'auto'")
        return tried[wanted]

    def _measured_attention(self, buffers: StepBuffers) -> Attention:
        """The fastest of the candidates on one layer's shapes, with random queries, keys and values."""
        stack = self.config.decoder.stack
        rows = buffers.shape.branches * buffers.shape.images
        generator = torch.Generator(self.device).manual_seed(0)
        q, k, v = (
            torch.randn(
                rows,
                heads,
                buffers.tokens,
                stack.head_dim,
                dtype=self.torch_dtype,
                device=self.device,
                generator=generator,
            )
            for heads in (stack.num_heads, stack.num_kv_heads, stack.num_kv_heads)
        )
        tried = candidates(torch.device(self.device), stack.head_dim, self.options.impl)
        return tried[choose(tried, q, k, v, buffers.segments(0, buffers.shape.branches, True))]

    def _need_vae(self) -> None:
        self.residency.need("vae")
        if is_cuda(self.device) and not self.options.limited:  # plans of a budget count no activations between layers
            self.model.vae.room = torch.cuda.mem_get_info(self.device)[0] // 2

    @on_device
    def vae(self, latents: Tensor) -> NDArray[np.float32]:
        self._need_vae()
        return super().vae(latents)

    @on_device
    def vae_encode(self, pixels: NDArray[np.float32]) -> Tensor:
        self._need_vae()
        return super().vae_encode(pixels)

    @on_device
    def numpy(self, array: Tensor) -> NDArray[np.float32]:
        return super().numpy(array)

    @on_device
    def finite(self, array: Tensor) -> bool:
        return super().finite(array)

    def close(self) -> None:
        limited = "options" in vars(self) and self.options.limited
        super().close()
        if limited:
            limit_memory(self.device, 1.0)


def _linears(stack: FastStack) -> Iterator[Linear]:
    for block in stack.blocks:
        assert isinstance(block, FastBlock)
        yield from block.linears()
