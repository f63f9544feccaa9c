"""The kernels of `gpu_suite`: each is checked against float64 first, and timed only if it is right."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mindomni_rt.backends.fast.attention import Segments, candidates
from mindomni_rt.checkpoint.config import ModelConfig
from mindomni_rt.kernels.decode_attention import decode_attention
from mindomni_rt.kernels.gemv import gemv
from mindomni_rt.kernels.int4_linear import int4_linear, quantize_int4
from mindomni_rt.kernels.int8_attention import int8_attention
from mindomni_rt.kernels.linear8 import linear8, linear8_library, quantize_weight
from mindomni_rt.kernels.norm_gemv import norm_gemv
from mindomni_rt.kernels.norms import add_norm
from mindomni_rt.kernels.quantize import quantize_rows
from mindomni_rt.kernels.rope import rope, split_heads
from mindomni_rt.kernels.segment_attention import segment_attention, segment_attention_torch
from mindomni_rt.kernels.swiglu import swiglu
from mindomni_rt.kernels.triton_compat import REFUSALS

from .measure import Meter, Run, relative_error


@dataclass(frozen=True, kw_only=True)
class Case:
    """One kernel at one shape. check() -> relative error; variants[ours] is timed beside the others.

    flops or bytes say what its ceiling is: matrix products (`peak` names which) or copies.
    """

    name: str
    check: Callable[[], float]
    bound: float
    variants: Mapping[str, Run]
    flops: float = 0.0
    bytes: float = 0.0
    peak: str = "matmul"
    note: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sizes:
    """Shapes that the kernels are measured at."""

    tokens: int
    lengths: tuple[int, int]
    cache: int
    dtype: torch.dtype
    tolerance: float


def run_case(case: Case, meter: Meter, ceilings: Mapping[str, float | None]) -> dict[str, Any]:
    """Error, then times of every variant. A failed check stops the timing."""
    try:
        error = case.check()
    except REFUSALS as failure:
        return {"name": case.name, "failed": f"{type(failure).__name__}: {str(failure)[:300]}"}
    found: dict[str, Any] = {"name": case.name, "error": error, "bound": case.bound, "right": error <= case.bound}
    if not found["right"]:
        return {**found, "note": "wrong: not timed"}
    times: dict[str, float | str] = {}
    for name, run in case.variants.items():
        try:
            times[name] = meter.kernel(run)
        except REFUSALS as failure:
            times[name] = f"does not run: {str(failure).splitlines()[0][:120]}"
    found["seconds"] = times
    ours = times.get("ours")
    if isinstance(ours, float):
        if case.flops:
            found["tflops"] = case.flops / ours / 1e12
            peak = ceilings.get(case.peak)
            found["of_matmul"] = found["tflops"] / peak if peak else None
        if case.bytes:
            found["gbps"] = case.bytes / ours / 1e9
            copy = ceilings.get("copy")
            found["of_copy"] = found["gbps"] / copy if copy else None
    return {**found, "note": case.note}


def cases(config: ModelConfig, sizes: Sizes, device: torch.device) -> Iterator[Case]:
    """Every kernel at the decoder's and the language model's shapes."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = sizes.dtype) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator).to(dtype)

    yield from _attention(config, sizes, device, draw)
    yield _decode(config, sizes, device, draw)
    yield from _fusions(config, sizes, device, draw)
    yield from _products(config, sizes, draw)
    yield from _one_row(config, sizes, draw)


def _attention(config: ModelConfig, sizes: Sizes, device: torch.device, draw: Callable[..., Tensor]) -> Iterator[Case]:
    stack = config.decoder.stack
    heads, d, n, longest = stack.num_heads, stack.head_dim, sizes.tokens, max(sizes.lengths)
    q, k, v = (draw(2, heads, n, d) for _ in range(3))
    keys, values, tk, tv = draw(2, heads, longest, d), draw(2, heads, longest, d), draw(2, heads, d), draw(2, heads, d)
    lengths = torch.tensor(sizes.lengths, dtype=torch.int32, device=device)
    segments = Segments(keys, values, tk, tv, lengths, sizes.lengths)
    few, rows = slice(0, min(2, heads)), slice(0, min(256, n))

    def exact() -> Tensor:
        pick = [t[:, few].double() for t in (keys, values, tk, tv, k, v)]
        return segment_attention_torch(
            q[:, few, rows].double(), (pick[0], pick[1]), (pick[2], pick[3]), (pick[4], pick[5]), lengths
        )

    def error(found: Tensor) -> float:
        return relative_error(found[:, few, rows], exact())

    def ours() -> Tensor:
        return segment_attention(q, (keys, values), (tk, tv), (k, v), lengths)

    flops = 4.0 * heads * n * d * sum(n + 1 + length for length in sizes.lengths)
    tried = {
        name: (lambda run=run: run(q, k, v, segments))
        for name, run in candidates(device, d).items()
        if name != "segment"
    }
    yield Case(
        name="segment_attention",
        check=lambda: error(ours()),
        bound=sizes.tolerance,
        variants={"ours": ours, **tried},
        flops=flops,
    )
    for pv in ("fp8", "16bit"):

        def eight(pv: str = pv) -> Tensor:
            return int8_attention(q, (keys, values), (tk, tv), (k, v), lengths, pv)

        yield Case(
            name=f"int8_attention_{pv}",
            check=lambda eight=eight: error(eight()),  # type: ignore[misc]
            bound=0.06 if pv == "fp8" else 0.03,
            variants={"ours": eight, "segment_attention": ours, "sdpa": tried["sdpa"]},
            flops=flops,
            note="packing included",
        )


def _decode(config: ModelConfig, sizes: Sizes, device: torch.device, draw: Callable[..., Tensor]) -> Case:
    stack, used = config.language.stack, sizes.cache - 7
    q = draw(1, stack.num_heads, 1, stack.head_dim)
    keys, values = (draw(1, stack.num_kv_heads, sizes.cache, stack.head_dim) for _ in range(2))
    length = torch.tensor([used], dtype=torch.int32, device=device)

    def check() -> float:
        k, v = (t[:, :, :used].double() for t in (keys, values))
        exact = F.scaled_dot_product_attention(q.double(), k, v, enable_gqa=True)
        return relative_error(decode_attention(q, keys, values, length), exact)

    def library() -> Tensor:
        return F.scaled_dot_product_attention(q, keys[:, :, :used], values[:, :, :used], enable_gqa=True)

    return Case(
        name="decode_attention",
        check=check,
        bound=sizes.tolerance,
        variants={"ours": lambda: decode_attention(q, keys, values, length), "sdpa": library},
        bytes=2.0 * stack.num_kv_heads * used * stack.head_dim * keys.element_size(),
        note=f"{used} tokens: latency, not bandwidth",
    )


def _fusions(config: ModelConfig, sizes: Sizes, device: torch.device, draw: Callable[..., Tensor]) -> Iterator[Case]:
    stack, rows = config.decoder.stack, 2 * sizes.tokens
    hidden, inner, heads, d = stack.hidden_size, stack.intermediate_size, stack.num_heads, stack.head_dim
    x, residual, weight = draw(rows, hidden), draw(rows, hidden), draw(hidden)
    size = x.element_size()

    def plain_norm() -> Tensor:
        return F.rms_norm(x + residual, (hidden,), weight, 1e-5)

    def check_norm() -> float:
        y, total = add_norm(x, weight, 1e-5, residual)
        wide = total.double()
        exact = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
        return max(relative_error(y, exact), relative_error(total, x.double() + residual.double()))  # type: ignore[arg-type]

    yield Case(
        name="add_norm",
        check=check_norm,
        bound=sizes.tolerance,
        variants={"ours": lambda: add_norm(x, weight, 1e-5, residual), "plain": plain_norm},
        bytes=4.0 * rows * hidden * size,
    )
    gate_up = draw(rows, 2 * inner)

    def check_gate() -> float:
        gate, up = gate_up.double().chunk(2, -1)
        return relative_error(swiglu(gate_up), F.silu(gate) * up)  # type: ignore[arg-type]

    yield Case(
        name="swiglu",
        check=check_gate,
        bound=sizes.tolerance,
        variants={
            "ours": lambda: swiglu(gate_up),
            "plain": lambda: F.silu(gate_up[:, :inner]) * gate_up[:, inner:],
        },
        bytes=3.0 * rows * inner * size,
    )
    angle = torch.rand(2, sizes.tokens, d // 2, device=device)
    cos, sin = angle.cos(), angle.sin()
    qkv = draw(2, sizes.tokens, 3 * heads * d)

    def check_rope() -> float:
        q, k, _ = rope(qkv.clone(), cos, sin, heads, heads)
        errors = []
        for found, given in zip((q, k), split_heads(qkv.double(), heads, heads)[:2], strict=True):
            z = torch.complex(given[..., : d // 2], given[..., d // 2 :])
            z = z * torch.complex(cos.double(), sin.double()).unsqueeze(1)
            errors.append(relative_error(found, torch.cat([z.real, z.imag], -1)))
        return max(errors)

    work = qkv.clone()
    yield Case(
        name="rope",
        check=check_rope,
        bound=sizes.tolerance,
        variants={
            "ours": lambda: rope(work, cos, sin, heads, heads),
            "plain": lambda: rope(qkv, cos, sin, heads, heads, impl="torch"),
        },
        bytes=4.0 * rows * heads * d * size,
    )


def _products(config: ModelConfig, sizes: Sizes, draw: Callable[..., Tensor]) -> Iterator[Case]:
    stack, rows = config.decoder.stack, sizes.tokens
    n, k = 2 * stack.intermediate_size, stack.hidden_size
    x, weight = draw(rows, k), draw(n, k)
    some = slice(0, min(rows, 512))
    for kind in ("int8", "fp8"):
        a, w = quantize_rows(x, kind), quantize_weight(weight, kind)

        def check(a: Any = a, w: Any = w) -> float:
            exact = a.dequantize(torch.float32)[some].double() @ w.dequantize().double().T
            return relative_error(linear8(a, w, sizes.dtype)[some], exact)

        variants: dict[str, Run] = {
            "ours": lambda a=a, w=w: linear8(a, w, sizes.dtype),  # type: ignore[misc]
            "with quantizing": lambda w=w, kind=kind: linear8(quantize_rows(x, kind), w, sizes.dtype),  # type: ignore[misc]
            "16 bits": lambda: F.linear(x, weight),
        }
        if x.is_cuda:
            variants["triton"] = lambda a=a, w=w: linear8(a, w, sizes.dtype, impl="triton")  # type: ignore[misc]
            variants["library"] = lambda a=a, w=w: linear8(a, w, sizes.dtype, impl="library")  # type: ignore[misc]
            if kind == "fp8":
                variants["library, short sums"] = lambda a=a, w=w: linear8_library(a, w, sizes.dtype, fast=True)  # type: ignore[misc]
        yield Case(
            name=f"linear8_{kind}",
            check=check,
            bound=sizes.tolerance,
            variants=variants,
            flops=2.0 * rows * n * k,
            peak=kind,
            note="gate_up of the decoder, one branch",
        )


def _one_row(config: ModelConfig, sizes: Sizes, draw: Callable[..., Tensor]) -> Iterator[Case]:
    stack = config.language.stack
    n, k = 2 * stack.intermediate_size, stack.hidden_size
    x, weight = draw(1, k), draw(n, k)
    exact = x.double() @ weight.double().T
    yield Case(
        name="gemv",
        check=lambda: relative_error(gemv(x, weight), exact),
        bound=sizes.tolerance,
        variants={"ours": lambda: gemv(x, weight), "library": lambda: F.linear(x, weight)},
        bytes=float(weight.numel() * weight.element_size()),
        note="gate_up of the language model",
    )
    eight = quantize_weight(weight, "int8")
    yield Case(
        name="gemv_int8",
        check=lambda: relative_error(gemv(x, eight), x.double() @ eight.dequantize().double().T),
        bound=sizes.tolerance,
        variants={"ours": lambda: gemv(x, eight), "16 bits": lambda: F.linear(x, weight)},
        bytes=float(weight.numel()),
    )
    r, norm = draw(1, k), draw(k)

    def check_gate() -> float:
        total = (x + r).double()
        normed = total / (total.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.double()
        first, second = (normed @ weight.double().T).chunk(2, -1)
        return relative_error(norm_gemv(x, weight, norm, 1e-6, r, gate=True)[0], F.silu(first) * second)

    yield Case(
        name="norm_gemv_gate",
        check=check_gate,
        bound=sizes.tolerance,
        variants={
            "ours": lambda: norm_gemv(x, weight, norm, 1e-6, r, gate=True),
            "apart": lambda: swiglu(F.linear(add_norm(x, norm, 1e-6, r)[0], weight)),  # type: ignore[arg-type]
        },
        bytes=float(weight.numel() * weight.element_size()),
    )
    four, several = quantize_int4(weight), draw(5, k)
    wide = four.dequantize().double()
    for name, rows in (("int4_gemv", x), ("int4_product_5_rows", several)):
        yield Case(
            name=name,
            check=lambda rows=rows: relative_error(int4_linear(rows, four), rows.double() @ wide.T),  # type: ignore[misc]
            bound=sizes.tolerance,
            variants={
                "ours": lambda rows=rows: int4_linear(rows, four),  # type: ignore[misc]
                "16 bits": lambda rows=rows: F.linear(rows, weight),  # type: ignore[misc]
            },
            bytes=float(four.packed.numel() + 2 * four.scale.numel() * four.scale.element_size()),
        )
