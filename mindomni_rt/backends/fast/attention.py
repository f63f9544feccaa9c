"""Which attention a denoise step uses: ours, or the library's over joined segments. Measured on the shapes at hand.

Axes: B batch (branch-major: all images of the guided branch first), P branches, H heads, N image tokens, D head_dim.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from mindomni_rt.kernels.int8_attention import int8_attention
from mindomni_rt.kernels.launch import split_head, tensor_cores
from mindomni_rt.kernels.segment_attention import segment_attention
from mindomni_rt.kernels.triton_compat import REFUSALS

from .tune import milliseconds

logger = logging.getLogger(__name__)
NEAR = 3e-2  # relative distance from the library's result beyond which a candidate is out (bf16 differs by 5e-3)
RUNS = 5


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


Attention = Callable[[Tensor, Tensor, Tensor, Segments], Tensor]


def ours(impl: str = "auto") -> Attention:
    """`segment_attention`: nothing is joined."""

    def run(q: Tensor, k: Tensor, v: Tensor, s: Segments) -> Tensor:
        time_pair = (s.time_keys, s.time_values) if s.with_image else None
        image = (k, v) if s.with_image else None
        return segment_attention(q, (s.keys, s.values), time_pair, image, s.lengths, impl=impl)

    run.any_length = True  # type: ignore[attr-defined]  # lengths are read on the device
    return run


def eight_bit(impl: str = "auto", pv: str = "fp8") -> Attention:
    """`int8_attention`; the quirk of a first step without the image goes to ours."""
    plain = ours(impl)

    def run(q: Tensor, k: Tensor, v: Tensor, s: Segments) -> Tensor:
        if not s.with_image:
            return plain(q, k, v, s)
        pair = (s.time_keys, s.time_values)
        return int8_attention(q, (s.keys, s.values), pair, (k, v), s.lengths, pv, impl=impl)

    run.any_length = True  # type: ignore[attr-defined]
    return run


def library(*backends: SDPBackend) -> Attention:
    """The library's attention, branch by branch over joined segments; the given backends only, if any."""

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

    return run


def candidates(device: torch.device, head_dim: int, impl: str = "auto") -> dict[str, Attention]:
    """What may run on a device, by name. The plain meaning stands for ours where it is forced or Triton cannot run."""
    found = {"sdpa": library()}
    if impl != "auto" or (tensor_cores(device) and split_head(head_dim)[0]):
        found["segment"] = ours(impl)
    if device.type == "cuda":
        found["flash"] = library(SDPBackend.FLASH_ATTENTION)
        found["cudnn"] = library(SDPBackend.CUDNN_ATTENTION)
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
    tried: Mapping[str, Attention],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    seconds: Callable[[Callable[[], Tensor], torch.device], float] = _seconds,
) -> str:
    """The fastest candidate on these tensors. One that fails or strays from "sdpa" is left out, and the log says so."""
    expected = tried["sdpa"](q, k, v, segments).float()
    measured: dict[str, float] = {}
    for name, attention in tried.items():
        try:
            found = attention(q, k, v, segments).float()
        except REFUSALS as error:
            logger.info("attention %s does not run here: %s", name, str(error).splitlines()[0])
            continue
        distance = float((found - expected).norm() / expected.norm())
        if not distance <= NEAR:
            logger.warning("attention %s is %.1e away from the library's and left out", name, distance)
            continue
        try:
            measured[name] = seconds(lambda attention=attention: attention(q, k, v, segments), q.device)  # type: ignore[misc]
        except REFUSALS as error:
            logger.info("attention %s cannot be captured: %s", name, str(error).splitlines()[0])
    best = min(measured, key=lambda name: measured[name])
    logger.info(
        "attention %s for %s: %s", best, tuple(q.shape), ", ".join(f"{n} {1e3 * t:.3f} ms" for n, t in measured.items())
    )
    return best
