"""Names of precisions, and what each costs on the fast path's emulated arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import PARITY, relative
from torch.nn import functional as F

import mindomni_rt
from mindomni_rt import BadRequestError
from mindomni_rt.backends.base import DenoiseRequest
from mindomni_rt.backends.fast.backend import FastOptions, TorchCudaBackend
from mindomni_rt.backends.fast.linear import make_linear, stored_bytes
from mindomni_rt.backends.fast.load import choose
from mindomni_rt.checkpoint.config import published
from mindomni_rt.memory.footprint import Precision
from mindomni_rt.memory.precision import KINDS, parse_precision, plain_vae, split_attention, stored
from mindomni_rt.model.mindomni import MindOmniModel
from mindomni_rt.model.random.scaled import scaled
from mindomni_rt.sampling.denoise import denoise
from mindomni_rt.sampling.schedule import timesteps


def test_names() -> None:
    assert parse_precision("fp8", "bfloat16") == Precision(decoder="fp8", vae="bfloat16")
    assert parse_precision("fp8fast", "bfloat16") == Precision(decoder="fp8fast", vae="bfloat16")
    assert parse_precision("int8", "bfloat16") == Precision(
        language="int8wo", head="int8wo", decoder="int8", vae="bfloat16"
    )
    assert parse_precision("int4", "bfloat16").language == "int4"
    assert parse_precision("bfloat16", "bfloat16") == Precision()
    found = parse_precision("language=int4, decoder=fp8", "bfloat16")
    assert (found.language, found.decoder, found.head, found.vae) == ("int4", "fp8", "bfloat16", "float32")
    assert parse_precision("decoder=fp8", "bfloat16", "bfloat16") == Precision(decoder="fp8", vae="bfloat16")
    assert parse_precision("vae=float32", "bfloat16", "bfloat16") == Precision()
    assert plain_vae("bfloat16", "cuda:1") == "bfloat16"
    assert {plain_vae("bfloat16", "cpu"), plain_vae("float16", "cuda"), plain_vae("float32", "cuda")} == {"float32"}
    assert parse_precision("language=bf16", "bfloat16") == Precision()  # either spelling
    assert [k.bits for k in KINDS.values() if k.name in ("int8", "int8wo", "int4")] == [8, 8, 4.25]
    with pytest.raises(BadRequestError, match="language in int8 while"):  # that is 8-bit activations
        stored(parse_precision("language=int8", "bfloat16"))
    for text in ("int3", "language", "language=int3", "vision=int8", "float16"):
        with pytest.raises(BadRequestError, match=r"expected|one of them"):
            parse_precision(text, "bfloat16")


def test_attention_is_named_beside() -> None:
    assert split_attention(None) == (None, "auto") and split_attention("int8") == ("int8", "auto")
    assert split_attention("attention=int8") == (None, "int8")
    assert split_attention("decoder=fp8, attention=flash") == ("decoder=fp8", "flash")
    for text in ("attention=fast", "attention=int8,attention=sdpa"):
        with pytest.raises(BadRequestError, match="attention"):
            split_attention(text)


def test_attention_in_8_bits_is_near() -> None:
    """Random weights with heads of 96: what 8-bit scores cost in the whole loop."""
    config = scaled("tiny")
    found = {}
    for attention in ("segment", "sdpa", "int8"):
        torch.manual_seed(0)
        model = MindOmniModel(config)
        backend = TorchCudaBackend(
            model.eval().requires_grad_(False), "cpu",
            options=FastOptions(precision=Precision.uniform("float32"), attention=attention),
        )  # fmt: skip
        condition = torch.randn(1, 6, config.decoder.stack.hidden_size, generator=torch.Generator().manual_seed(1))
        times = timesteps(3)
        prefix = backend.prefix(condition, times[:-1], 36)
        request = DenoiseRequest(
            latents=np.random.default_rng(0).standard_normal((1, 4, 12, 12)).astype(np.float32),
            times=times, guided=prefix, unguided=None, guidance_scale=1.0,
        )  # fmt: skip
        *_, last = denoise(backend, request)
        found[attention] = backend.numpy(last.latents)
    assert relative(found["segment"], found["sdpa"]) < 1e-5
    pipe = mindomni_rt.load(PARITY, device="cpu", fast=True, precision="attention=flash")
    with pytest.raises(mindomni_rt.UnsupportedDeviceError, match="attention 'flash'"):
        pipe.generate("x", height=32, width=32, num_inference_steps=1, max_new_tokens=1)
    assert 1e-6 < relative(found["int8"], found["sdpa"]) < 2e-2


def test_what_is_kept_how() -> None:
    kept = stored(parse_precision("int8", "bfloat16"))
    assert kept == {"language": "int8wo", "head": "int8wo", "decoder": "int8"}
    assert stored(Precision()) == dict.fromkeys(("language", "head", "decoder"), "bfloat16")
    with pytest.raises(BadRequestError, match="language in fp8"):
        stored(Precision(language="fp8"))
    with pytest.raises(BadRequestError, match="decoder in nvfp4"):
        stored(Precision(decoder="nvfp4"))


@pytest.mark.parametrize(
    ("kept", "low", "high", "bits"),
    [("float32", 0, 1e-6, 32), ("int8", 3e-3, 2e-2, 8), ("int8wo", 2e-3, 1.5e-2, 8), ("fp8", 1e-2, 6e-2, 8),
     ("fp8fast", 1e-2, 6e-2, 8),
     ("int4", 3e-2, 0.12, 4)],
)  # fmt: skip
@pytest.mark.parametrize("bias", [False, True])
def test_error_and_size_of_each_product(kept: str, low: float, high: float, bits: int, bias: bool) -> None:
    """Gaussian weights and rows: the order that the formats promise, and the bytes they promise."""
    g = torch.Generator().manual_seed(0)
    weight, x = torch.randn(256, 512, generator=g), torch.randn(3, 7, 512, generator=g)
    b = torch.randn(256, generator=g) if bias else None
    product = make_linear(weight, b, kept)
    found, expected = product(x), F.linear(x, weight, b)
    error = float((found - expected).norm() / expected.norm())
    assert low <= error < high
    scales = {4: 512 // 128 * 2 * 32, 8: 32, 32: 0}[bits]  # bits a row; a 4-bit group has two
    assert stored_bytes(product) * 8 == 256 * (512 * bits + scales + 32 * bias)


def test_unknown_storage() -> None:
    with pytest.raises(BadRequestError, match="expected one of"):
        make_linear(torch.zeros(4, 4), None, "int2")


def test_quality_falls_with_the_bits() -> None:
    """Latents on the parity checkpoint (random weights, 48 and 64 wide: harder than a trained model)."""
    options = dict(height=32, width=48, num_inference_steps=4, think=False, seed=1, output="numpy")
    exact = mindomni_rt.load(PARITY, device="cpu").generate("two cats", **options)
    errors = {}
    for precision in ("decoder=int8", "decoder=fp8", "decoder=int4"):
        pipe = mindomni_rt.load(PARITY, device="cpu", fast=True, precision=precision)
        found = pipe.generate("two cats", **options)
        errors[precision] = relative(found.latents, exact.latents)
        assert np.isfinite(found.images).all()
    assert errors["decoder=int8"] < 0.03 and errors["decoder=fp8"] < 0.08 and errors["decoder=int4"] < 0.25
    assert 1e-5 < errors["decoder=int8"] < errors["decoder=fp8"] < errors["decoder=int4"]


def test_what_stays_in_the_compute_type() -> None:
    """Embeddings, norms, time, final layer and modulation are never quantized; the head's kind is its own."""
    pipe = mindomni_rt.load(PARITY, device="cpu", fast=True, dtype="bfloat16", precision="int4")
    backend = pipe.backend
    assert isinstance(backend, TorchCudaBackend)
    decoder, language = backend.model.decoder, backend.model.language
    for part in (decoder.x_embedder, decoder.final_layer, decoder.t_embedder, decoder.time_token, decoder.llm.norm):
        assert all(p.dtype == torch.bfloat16 for p in part.parameters())
    assert language.embed_tokens.weight.dtype == language.norm.weight.dtype == torch.bfloat16
    kinds = {t.dtype for t in backend.decoder_stack.blocks[0].qkv.buffers()}
    assert torch.int8 in kinds
    assert torch.uint8 in {t.dtype for t in backend.language_stack.blocks[0].qkv.buffers()}
    assert torch.int8 in {t.dtype for t in backend.head.buffers()}
    assert next(backend.model.vae.parameters()).dtype == torch.bfloat16
    assert len(pipe.generate("x", height=32, width=32, num_inference_steps=2, max_new_tokens=3).images) == 1


@pytest.mark.parametrize(
    ("budget", "language", "decoder"),
    [
        ("8GB", "int4", "int8"),
        ("12GB", "int8wo", "bfloat16"),
        ("16GB", "int8wo", "bfloat16"),  # room for a prompt of 256 tokens
        ("17GB", "bfloat16", "bfloat16"),
        ("24GB", "bfloat16", "bfloat16"),
        ("40GB", "bfloat16", "bfloat16"),
    ],
)
def test_budgets_of_real_cards(budget: str, language: str, decoder: str) -> None:
    """The published model at 1024²: what `load(memory_budget=…)` keeps, by the planner."""
    precision, found = choose(published(), "bfloat16", None, budget, "cuda")
    assert found is not None
    assert (len(found.resident) == 5) == (budget == "40GB")
    assert (precision.language, precision.decoder) == (language, decoder)


def test_errors_of_load() -> None:
    with pytest.raises(BadRequestError, match="fast path"):
        mindomni_rt.load(PARITY, device="cpu", precision="int8")
    with pytest.raises(BadRequestError, match="precision"):
        mindomni_rt.load(PARITY, device="cpu", fast=True, precision="int2")
