"""Weights and activations of a loaded pipeline rounded to fewer bits, by the plainest meaning of each precision.

Products stay in float32, so a figure shows what rounding costs and nothing else; fp8fast alone sums as well in fewer
bits (`short_sums`). The fast path has kernels for int8, fp8 and int4; nvfp4 is in engines for Blackwell alone
(`export`).

    python -m mindomni_rt.benchmarks.quality.rounding --out FILE.json  # fp8 sums of the decoder at full depth, emulated
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mindomni_rt.backends.fast.backend import TorchCudaBackend
from mindomni_rt.backends.fast.linear import Linear
from mindomni_rt.checkpoint.config import StackConfig, published
from mindomni_rt.kernels.int4_linear import quantize_int4
from mindomni_rt.kernels.linear8 import BLOCK_K
from mindomni_rt.kernels.quantize import Rows, quantize_rows_torch
from mindomni_rt.memory.precision import Precision

from .. import results
from ..machine import commit

FP4_BLOCK = 16
STEP = 32  # products that one instruction of Ada and Hopper adds at once
FRACTION = 13  # bits of a sum's fraction there, by published tests of these cards (fp22)
Rounding = Callable[[Tensor], Tensor]


def rows(kind: str) -> Rounding:
    """int8 or e4m3 with a scale for each row: a token's activations, an output channel's weights."""
    return lambda x: quantize_rows_torch(x, kind).dequantize()


def int4_groups(weight: Tensor) -> Tensor:
    """Four bits with a scale and a minimum for each group of 128."""
    return quantize_int4(weight).dequantize()


def fp4_blocks(x: Tensor) -> Tensor:
    """e2m1 in blocks of 16, each with an e4m3 scale under one float32 scale of the whole tensor."""
    blocks = x.unflatten(-1, (-1, FP4_BLOCK))
    top = (x.abs().max() / (448.0 * 6.0)).clamp_min(1e-30)
    scale = (blocks.abs().amax(-1, keepdim=True) / 6.0 / top).clamp_max(448.0).to(torch.float8_e4m3fn).float() * top
    y = (blocks / scale.clamp_min(1e-30)).clamp(-6.0, 6.0)
    size = y.abs()  # numbers lie 1/2 apart below 2, then 1, then 2; round() takes the even one of two
    y = torch.where(size < 2, (2 * y).round() / 2, torch.where(size < 4, y.round(), 2 * (y / 2).round()))
    return (y * scale).flatten(-2)


def bfloat16(x: Tensor) -> Tensor:
    """To 8 bits of mantissa."""
    return x.bfloat16().float()


def whole(x: Tensor) -> Tensor:
    """No rounding."""
    return x


MEANINGS: dict[str, tuple[Rounding, Rounding]] = {
    "float32": (whole, whole),
    "bfloat16": (bfloat16, bfloat16),
    "int8": (rows("int8"), rows("int8")),
    "int8wo": (rows("int8"), whole),
    "fp8": (rows("fp8"), rows("fp8")),
    "fp8fast": (rows("fp8"), rows("fp8")),
    "int4": (int4_groups, whole),
    "nvfp4": (fp4_blocks, fp4_blocks),
}
"""Precision -> what happens to a weight (N, K) and to its input (…, K)."""


def short_sums(a: Rows, weight: Rows, promote: int | None = None, columns: int = 1024) -> Tensor:
    """The product of fp8 rows (M, K) and a weight (N, K) as Ada's and Hopper's tensor cores form it, emulated.

    `STEP` products and the sum so far are aligned to the largest exponent among them, bits below its fraction are cut
    off, and so are those of the new sum. promote: products after which the sum goes to a float32 number and starts
    again; None never does. Follows what was found about these cards in public; no card was asked.
    """
    x, scale = a.values.float().T.contiguous(), a.scale.reshape(-1, 1) * weight.scale.reshape(1, -1)
    out = torch.empty(scale.shape)
    for first in range(0, scale.shape[1], columns):
        w = weight.values[first : first + columns].float().T.contiguous()
        total, sums = torch.zeros(2, x.shape[1], w.shape[1])
        for at in range(0, x.shape[0], STEP):
            sums = _aligned_sum(x[at : at + STEP, :, None] * w[at : at + STEP, None], sums)
            if promote and (at + STEP) % promote == 0:
                total, sums = total + sums, torch.zeros_like(sums)
        out[:, first : first + columns] = total + sums
    return out * scale


def _aligned_sum(products: Tensor, before: Tensor) -> Tensor:
    low, high = products.aminmax(dim=0)
    top = torch.maximum(torch.maximum(high, -low), before.abs()).clamp_min(2.0**-60)
    power = (top.view(torch.int32) & 0x7F800000).view(torch.float32)  # of two, at or below it
    unit = power * 2.0**-FRACTION
    sums = (products.mul_(1 / unit).trunc_().sum(0) + (before / unit).trunc_()) * unit
    return (sums.view(torch.int32) & -(1 << 23 - FRACTION)).view(torch.float32)


class RoundedLinear(Linear):
    """A linear layer of the fast path over rounded numbers."""

    weight: Tensor

    def __init__(self, layer: Any, kind: str) -> None:
        super().__init__(layer.bias, "torch")
        weight, self._rounded = MEANINGS[kind]
        self.register_buffer("weight", weight(layer.weight))
        self._short = quantize_rows_torch(layer.weight, "fp8") if kind == "fp8fast" else None

    def forward(self, x: Tensor | Rows) -> Tensor:
        assert isinstance(x, Tensor)
        if self._short:
            found = short_sums(quantize_rows_torch(x.flatten(0, -2), "fp8"), self._short).unflatten(0, x.shape[:-1])
            return found if self.bias is None else found + self.bias
        return F.linear(self._rounded(x), self.weight, self.bias)


@contextmanager
def rounded(backend: TorchCudaBackend, precision: Precision) -> Iterator[None]:
    """The backend, loaded in float32, with the blocks and the head that `precision` names rounded."""
    owners: list[tuple[Any, str, str]] = [(backend.model.language, "lm_head", precision.head)]
    for stack, kind in ((backend.language_stack, precision.language), (backend.decoder_stack, precision.decoder)):
        owners += [(block, name, kind) for block in stack.blocks for name in ("qkv", "o", "gate_up", "down")]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in owners]
    try:
        for owner, name, kind in owners:
            setattr(owner, name, RoundedLinear(getattr(owner, name), kind))
        yield
    finally:
        for owner, name, layer in before:
            setattr(owner, name, layer)


Product = Callable[[Tensor, Tensor], Tensor]


def _fp8(sums: Callable[[Rows, Rows], Tensor]) -> Product:
    return lambda x, weight: sums(quantize_rows_torch(x, "fp8"), quantize_rows_torch(weight, "fp8"))


def _float32_sums(a: Rows, weight: Rows) -> Tensor:
    return F.linear(a.dequantize(), weight.dequantize())


FORMS: dict[str, Product] = {
    "float32": F.linear,
    "fp8, float32 sums": _fp8(_float32_sums),
    "fp8": _fp8(partial(short_sums, promote=BLOCK_K)),
    "fp8fast": _fp8(short_sums),
}
"""What computes (M, K) times (N, K) transposed."""
NAMES = ("qkv", "o", "gate_up", "down")


def _weights(stack: StackConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """One layer's, normal over the square root of the fan-in, as random checkpoints have them."""
    width, inner = stack.hidden_size, stack.intermediate_size
    keys = stack.num_kv_heads * stack.head_dim
    shapes = ((width + 2 * keys, width), (width, width), (2 * inner, width), (width, inner))
    return {
        name: torch.randn(n, k, generator=generator).mul_(k**-0.5) for name, (n, k) in zip(NAMES, shapes, strict=True)
    }


def _layer(stack: StackConfig, x: Tensor, weights: dict[str, Tensor], product: Product) -> tuple[Tensor, ...]:
    """(the layer's output, then the input of each product): a block without positions, whose tokens see each other."""
    normed = F.rms_norm(x, x.shape[-1:], eps=stack.rms_norm_eps)
    keys = stack.num_kv_heads * stack.head_dim
    q, k, v = (
        part.unflatten(1, (-1, stack.head_dim)).transpose(0, 1)
        for part in product(normed, weights["qkv"]).split((stack.hidden_size, keys, keys), 1)
    )
    seen = F.scaled_dot_product_attention(q[None], k[None], v[None], enable_gqa=True)[0].transpose(0, 1).flatten(1)
    x = x + product(seen, weights["o"])
    second = F.rms_norm(x, x.shape[-1:], eps=stack.rms_norm_eps)
    gate, up = product(second, weights["gate_up"]).chunk(2, 1)
    gated = F.silu(gate) * up
    return x + product(gated, weights["down"]), normed, seen, second, gated


def by_layer(stack: StackConfig, tokens: int, seed: int = 0) -> list[dict[str, Any]]:
    """Of each layer: the relative error of the stream behind it, by form, against float32's; and of each product over
    the float32 stream's inputs, what its sums alone cost: against float32 sums of the same fp8 numbers."""
    generator = torch.Generator().manual_seed(seed)
    streams = dict.fromkeys(FORMS, torch.randn(tokens, stack.hidden_size, generator=generator))
    found = []
    for _ in range(stack.num_layers):
        weights = _weights(stack, generator)
        streams["float32"], *inputs = _layer(stack, streams["float32"], weights, F.linear)
        for form in list(FORMS)[1:]:
            streams[form] = _layer(stack, streams[form], weights, FORMS[form])[0]
        sums: dict[str, dict[str, float]] = {"fp8": {}, "fp8fast": {}, "unsigned": {}}
        for name, x in zip(NAMES, inputs, strict=True):
            few, exact = weights[name][:512], FORMS["fp8, float32 sums"]
            for form in ("fp8", "fp8fast"):
                sums[form][name] = _apart(FORMS[form](x, few), exact(x, few))
            x, few = x.abs(), few.abs()
            sums["unsigned"][name] = _apart(FORMS["fp8fast"](x, few), exact(x, few))
        stream = {form: _apart(streams[form], streams["float32"]) for form in list(FORMS)[1:]}
        found.append({"stream": stream, "sums": sums})
    return found


def _apart(found: Tensor, wanted: Tensor) -> float:
    return round(float((found - wanted).norm() / wanted.norm()), 7)


def main(arguments: list[str] | None = None) -> None:
    """Writes figures of the decoder at the published sizes, or as many of its layers as are asked for."""
    parser = argparse.ArgumentParser(description="what fp8 sums in fewer bits cost the decoder, emulated on a CPU")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=4)
    parser.add_argument("--layers", type=int, help="only the first N")
    options = parser.parse_args(arguments)
    results.check_out(options.out)
    stack = published().decoder.stack
    stack = replace(stack, num_layers=options.layers or stack.num_layers)
    layers = by_layer(stack, options.tokens)
    data = {
        "what": "fp8 sums in the registers of tensor cores, emulated on a CPU: no GPU was asked",
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "command": f"python -m mindomni_rt.benchmarks.quality.rounding --tokens {options.tokens}",
        "versions": {"torch": torch.__version__},
        "weights": "random, normal over the square root of the fan-in, seed 0",
        "stack": asdict(stack),
        "tokens": options.tokens,
        "fraction_bits": FRACTION,
        "products_at_once": STEP,
        "promoted_after": BLOCK_K,
        "layers": layers,
    }
    results.write_result(options.out, data, report(data))


def report(data: dict[str, Any]) -> str:
    """The figures as Markdown."""
    kinds = (("fp8", ("down",)), ("fp8fast", NAMES), ("unsigned", NAMES))
    columns = [(kind, name) for kind, names in kinds for name in names]
    heads = ["layer", *(f"stream, {form}" for form in list(FORMS)[1:]), *(f"{kind} {name}" for kind, name in columns)]
    rows = [
        [
            str(at),
            *(f"{e:.4f}" for e in layer["stream"].values()),
            *(f"{layer['sums'][kind][name]:.1e}" for kind, name in columns),
        ]
        for at, layer in enumerate(data["layers"], 1)
    ]
    note = (
        f"{data['what']} (`{data['command']}`). Relative errors. Stream: behind the layer, against float32. By product:"
        " against float32 sums of the same fp8 numbers; unsigned: fp8fast over magnitudes, the most that can be lost."
    )
    return f"{note}\n\n{results.table(heads, rows)}"


if __name__ == "__main__":
    main()
