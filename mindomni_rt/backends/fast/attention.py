"""Which attention a denoising step uses: our kernel, or SDPA over concatenated segments. Measured on its shapes.

Axes: B batch (branch-major: all images of the guided branch first), P branches, H heads, N image tokens, D head_dim.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from mindomni_rt.kernels.int8_attention import int8_attention
from mindomni_rt.kernels.launch import split_head, tensor_cores
from mindomni_rt.kernels.segment_attention import segment_attention
from mindomni_rt.kernels.triton_compat import REFUSALS

from . import timings
from .tune import milliseconds

logger = logging.getLogger(__name__)
NEAR = 3e-2  # candidates whose output differs from SDPA by more are discarded (relative; bfloat16 differs by 5e-3)
RUNS = 5
PLANNED = SDPBackend.CUDNN_ATTENTION
"""The backend of SDPA that builds a plan for every shape it meets, in 23 to 440 ms by reports."""
UNPLANNED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True)
class Segments:
    """What a step's queries see. keys, values (P, H, C, D), of which branch p uses lengths[p] (host) rows; time_keys,
    time_values (P, H, D) or None; with_image False leaves the condition alone, the released code's first step."""

    keys: Tensor
    values: Tensor
    time_keys: Tensor
    time_values: Tensor
    lengths: Tensor
    host_lengths: tuple[int, ...]
    with_image: bool = True


Run = Callable[[Tensor, Tensor, Tensor, Segments], Tensor]
"""(q (B, Hq, N, D), k, v (B, Hkv, N, D), segments) -> (B, Hq, N, D)."""


@dataclass(frozen=True, eq=False)
class Attention:
    """An attention. any_length: it reads the lengths on the device, so a captured graph serves other lengths too."""

    run: Run
    any_length: bool = False

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        return self.run(q, k, v, segments)


def ours(impl: str = "auto") -> Attention:
    """`segment_attention`: reads each segment where it lies."""

    def run(q: Tensor, k: Tensor, v: Tensor, s: Segments) -> Tensor:
        time_pair = (s.time_keys, s.time_values) if s.with_image else None
        image = (k, v) if s.with_image else None
        return segment_attention(q, (s.keys, s.values), time_pair, image, s.lengths, impl=impl)

    return Attention(run, any_length=True)


def eight_bit(impl: str = "auto", pv: str = "fp8") -> Attention:
    """`int8_attention`; a first step that sees the condition alone uses `segment_attention`."""
    plain = ours(impl)

    def run(q: Tensor, k: Tensor, v: Tensor, s: Segments) -> Tensor:
        if not s.with_image:
            return plain(q, k, v, s)
        pair = (s.time_keys, s.time_values)
        return int8_attention(q, (s.keys, s.values), pair, (k, v), s.lengths, pv, impl=impl)

    return Attention(run, any_length=True)


def unplanned() -> AbstractContextManager[None]:
    """SDPA without cuDNN inside: for prompts, whose lengths are new with each request."""
    return sdpa_kernel(UNPLANNED)  # type: ignore[no-any-return]


def _joined(prefix: Tensor, at: Tensor, image: Tensor, with_image: bool) -> Tensor:
    """[image | time | condition, all of its capacity] (B, H, K, D): what counts comes first."""
    share = image.shape[0] // prefix.shape[0]
    parts = [at.unsqueeze(2), prefix] if with_image else [prefix]
    rows = [t.repeat_interleave(share, 0) if share > 1 else t for t in parts]
    return torch.cat([image, *rows] if with_image else rows, dim=2)


def _seen(s: Segments, rows: int, images: int) -> Tensor:
    """Keys of `_joined` that count, int32 (B,), on the device."""
    seen = s.lengths + (images + 1 if s.with_image else 0)
    return seen.repeat_interleave(rows // len(seen)) if rows > len(seen) else seen


def masked() -> Attention:
    """SDPA over segments side by side, under a mask of the lengths on the device. (Flash attention takes no mask.)"""

    def run(q: Tensor, k: Tensor, v: Tensor, s: Segments) -> Tensor:
        keys = _joined(s.keys, s.time_keys, k, s.with_image)
        values = _joined(s.values, s.time_values, v, s.with_image)
        mask = torch.arange(keys.shape[2], device=q.device) < _seen(s, q.shape[0], k.shape[2])[:, None]
        with unplanned():
            out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask[:, None, None])
        return out.transpose(1, 2).contiguous().transpose(1, 2)

    return Attention(run, any_length=True)


def flash() -> Attention:
    """FlashAttention over segments side by side; it reads how many keys count on the device."""
    from torch.nn.attention.varlen import varlen_attn

    def run(q: Tensor, k: Tensor, v: Tensor, s: Segments) -> Tensor:
        keys = _joined(s.keys, s.time_keys, k, s.with_image)
        values = _joined(s.values, s.time_values, v, s.with_image)
        batch, _, queries, _ = q.shape
        places = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
        flat_q, flat_k, flat_v = (t.transpose(1, 2).flatten(0, 1) for t in (q, keys, values))
        out = varlen_attn(
            flat_q, flat_k, flat_v, places * queries, places * keys.shape[2], queries, keys.shape[2],
            seqused_k=_seen(s, batch, k.shape[2]),
        )  # fmt: skip
        assert isinstance(out, Tensor)
        return out.unflatten(0, (batch, queries)).transpose(1, 2)

    return Attention(run, any_length=True)


def sdpa(*backends: SDPBackend) -> Attention:
    """SDPA, branch by branch over concatenated segments; restricted to the given backends, if any.

    A graph over it serves one pair of lengths: with each new prompt it is captured anew.
    """

    def run(q: Tensor, k: Tensor, v: Tensor, s: Segments) -> Tensor:
        share = q.shape[0] // s.keys.shape[0]
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)
        for branch, length in enumerate(s.host_lengths):
            rows = slice(branch * share, (branch + 1) * share)
            sides = []
            for prefix, at, image in ((s.keys, s.time_keys, k), (s.values, s.time_values, v)):
                parts = [prefix[branch, :, :length].expand(share, -1, -1, -1)]
                if s.with_image:
                    parts += [at[branch].unsqueeze(1).expand(share, -1, -1, -1), image[rows]]
                sides.append(torch.cat(parts, dim=2))
            if backends:
                with sdpa_kernel(list(backends)):
                    out[rows] = F.scaled_dot_product_attention(q[rows], sides[0], sides[1])
            else:
                out[rows] = F.scaled_dot_product_attention(q[rows], sides[0], sides[1])
        return out

    return Attention(run)


def candidates(device: torch.device, head_dim: int, impl: str = "auto") -> dict[str, Attention]:
    """What "auto" chooses from on a device, by name: attentions that serve any length with one graph.

    "segment" runs the reference implementation where Triton cannot run.
    """
    found = {"sdpa": masked()}
    if impl != "auto" or (tensor_cores(device) and split_head(head_dim)[0]):
        found["segment"] = ours(impl)
    if device.type == "cuda" and find_spec("torch.nn.attention.varlen") is not None:
        found["flash"] = flash()
    return found


def named(device: torch.device, head_dim: int, impl: str = "auto") -> dict[str, Attention]:
    """What can be asked for by name."""
    found = candidates(device, head_dim, impl)
    if device.type == "cuda":
        found["cudnn"] = sdpa(PLANNED)
    return found


def _seconds(run: Callable[[], Tensor], device: torch.device) -> float:
    """Median seconds of one run: as a graph on CUDA, as the loop runs it."""
    if device.type == "cuda":
        return milliseconds(run) / 1e3
    times = []
    for _ in range(RUNS):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return sorted(times)[RUNS // 2]


def choose(
    tried: Mapping[str, Run],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    seconds: Callable[[Callable[[], Tensor], torch.device], float] = _seconds,
) -> str:
    """The fastest candidate on these tensors. Those that fail or differ from "sdpa" are discarded and logged."""
    label = f"attention {tuple(q.shape)} over {tuple(k.shape)} in {len(segments.keys)} branches, {q.dtype}"
    measured = {n: t for n, t in (timings.known(q.device, label) or {}).items() if n in tried}
    expected = q if measured else tried["sdpa"](q, k, v, segments).float()
    for name, attention in () if measured else tried.items():
        try:
            found = attention(q, k, v, segments).float()
        except REFUSALS as error:
            logger.info("attention %s does not run here: %s", name, str(error).splitlines()[0])
            continue
        distance = float((found - expected).norm() / expected.norm())
        if not distance <= NEAR:
            logger.warning("attention %s differs from SDPA by %.1e and is discarded", name, distance)
            continue
        try:
            measured[name] = seconds(lambda attention=attention: attention(q, k, v, segments), q.device)  # type: ignore[misc]
        except REFUSALS as error:
            logger.info("attention %s cannot be captured: %s", name, str(error).splitlines()[0])
    timings.keep(q.device, label, measured)
    best = min(measured, key=lambda name: measured[name])
    logger.info(
        "attention %s for %s: %s", best, tuple(q.shape), ", ".join(f"{n} {1e3 * t:.3f} ms" for n, t in measured.items())
    )
    return best
