"""The cost model against figures worked out by hand and against torch's own counter."""

from __future__ import annotations

import numpy as np
import pytest

from mindomni_rt.checkpoint.config import published
from mindomni_rt.devices.table import load_devices, with_figures
from mindomni_rt.memory.costs import (
    SCHEMES,
    denoiser_cost,
    language_costs,
    prefix_cost,
    request_costs,
    vae_cost,
    vision_cost,
)
from mindomni_rt.memory.layers import PARTS, Workload, block_linears, parameters
from mindomni_rt.memory.roofline import bound, kernel_seconds
from mindomni_rt.model.random.scaled import scaled

CONFIG = published()


def test_weights_of_a_decoder_layer():
    # qkv 3072 x 9216 + o 3072 x 3072 + gate_up 3072 x 16384 + down 8192 x 3072
    assert sum(item.weights for item in block_linears(CONFIG.decoder.stack)) == 113_246_208


def test_decoder_forward_and_step():
    # 4096 rows: 2 * 4096 * 113.25 M * 32 = 29.69 T; attention 4 * 4096 * 4397 * 3072 * 32 = 7.08 T
    forward = denoiser_cost(CONFIG, (300,), 4096).flops
    assert forward == pytest.approx(36.77e12, rel=1e-3)
    assert denoiser_cost(CONFIG, (300, 300), 4096).flops == pytest.approx(73.54e12, rel=1e-3)
    assert denoiser_cost(CONFIG, (300, 300), 1024).flops == pytest.approx(15.9e12, rel=5e-3)  # 512 x 512


def test_bytes_of_a_decoded_token():
    decode = language_costs(CONFIG, (100,), 2)[1]
    weights = decode.elements("weights") + decode.elements("head")
    assert 2 * weights == pytest.approx(14.14e9, rel=1e-3)


def test_prefill_and_vae():
    assert language_costs(CONFIG, (150,), 0)[0].flops == pytest.approx(1.96e12, rel=5e-3)
    assert vae_cost(CONFIG, 1024, 1024).flops == pytest.approx(10.47e12, rel=1e-3)


@pytest.mark.parametrize(
    ("scheme", "gigabytes"), [("bf16-eager", 82), ("bf16", 52), ("w8a8+attn8", 31), ("w4a4+attn8", 24)]
)
def test_bytes_of_a_step(scheme, gigabytes):
    chosen = SCHEMES[scheme]
    cost = denoiser_cost(CONFIG, (300, 300), 4096, fused=chosen.fused)
    assert sum(chosen.bytes(op) * op.repeat for op in cost.ops) / 1e9 == pytest.approx(gigabytes, rel=0.01)


# Seconds for 50 steps at L = 300, worked out apart from this code from the same sheet of devices.
@pytest.mark.parametrize(
    ("device", "scheme", "seconds"),
    [
        ("h200", "bf16", 4.73),
        ("h200", "w8a8", 2.83),
        ("rtx5090", "w4a4+attn8", 2.74),
        ("rtx4090", "w8a8", 9.0),
        ("rtx4060", "bf16", 123),
        ("agx-orin", "w8a8+attn8", 45),
        ("orin-nx", "bf16", 197),
        ("thor", "bf16-eager", 21.2),
        ("dgx-spark", "w8a8", 18.6),
    ],
)
def test_floors(device, scheme, seconds):
    chosen, sheet = SCHEMES[scheme], load_devices().devices[device]
    peaks = {"gemm": sheet.best(chosen.gemm), "attention": sheet.best(chosen.attention)}
    cost = denoiser_cost(CONFIG, (300, 300), 4096, 50, fused=chosen.fused)
    floor = 50 * sum(kernel_seconds(op, chosen, peaks, sheet.speed) for op in cost.ops)
    assert floor == pytest.approx(seconds, rel=0.02)


def test_predictions_lie_above_floors():
    sheet = load_devices()
    for device in with_figures(None, sheet):
        for scheme in ("bf16", "w8a8", "w4a4+attn8"):
            found = bound(CONFIG, Workload(), device, scheme, sheet.efficiency)
            if found is None:
                assert scheme == "w4a4+attn8" and device.sm == "sm_90"  # Hopper multiplies no 4-bit numbers
                continue
            assert all(found.prediction[s] >= found.floor[s] for s in found.floor)


def test_parameters_of_every_part():
    torch = pytest.importorskip("torch")
    from mindomni_rt.model.mindomni import MindOmniModel

    for config in (CONFIG, scaled("tiny"), scaled("small")):
        with torch.device("meta"):
            model = MindOmniModel(config)
        for part in PARTS:
            assert parameters(config)[part].total == sum(p.numel() for p in getattr(model, part).parameters()), part


def _count(run) -> int:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # The counter does not know the CPU's fused attention; the plain one is made of products that it knows.
    with FlopCounterMode(display=False) as counter, torch.inference_mode(), sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()


@pytest.fixture(scope="module")
def backend():
    torch = pytest.importorskip("torch")
    from mindomni_rt.backends.torch.backend import TorchBackend
    from mindomni_rt.model.mindomni import MindOmniModel

    torch.manual_seed(0)
    return TorchBackend(MindOmniModel(scaled("tiny")).eval().requires_grad_(False))


def test_torch_counts_the_same_in_every_stage(backend):
    """Convolutions, products and attention of our modules; the counter counts masked pairs too."""
    from mindomni_rt.backends.base import DenoiseRequest, LanguageRequest
    from mindomni_rt.inputs.images import ImagePatches
    from mindomni_rt.sampling.decode import generate_tokens
    from mindomni_rt.sampling.denoise import denoise

    config = backend.config
    work = Workload(
        prompt_tokens=20, new_tokens=4, negative_tokens=6, height=96, width=64, steps=3, patches=(12, 10), images=2
    )
    costs = {c.name: c for c in request_costs(config, work, causal=False)}

    patches = ImagePatches(np.zeros((120, config.vision.patch_dim), np.float32), (1, 12, 10))
    assert _count(lambda: backend.vision(patches)) == vision_cost(config, (12, 10)).flops

    def language(tokens: int, new: int):
        request = LanguageRequest(
            token_ids=np.zeros(tokens, np.int64),
            positions=np.broadcast_to(np.arange(tokens), (3, tokens)).copy(),
            next_position=tokens,
            max_new_tokens=new,
        )
        session = backend.language(request)
        return session.hidden(len(list(generate_tokens(session))))

    decoded = costs["language.decode"]
    prefill = language_costs(config, (20,), 4, causal=False)[0]
    assert _count(lambda: language(20, 4)) == pytest.approx(prefill.flops + decoded.units * decoded.flops, rel=1e-3)

    hiddens = [language(20, 4), language(6, 0)]
    conditions = [backend.connector(h) for h in hiddens]
    assert _count(lambda: [backend.connector(h) for h in hiddens]) == costs["connector"].flops
    times = np.linspace(0, 1, 4)

    def prefix():
        return [backend.prefix(c, times[:-1], work.image_tokens) for c in conditions]

    assert _count(prefix) == prefix_cost(config, work.branches, 3, causal=False).flops
    guided, unguided = prefix()
    request = DenoiseRequest(
        latents=np.zeros((2, 4, 12, 8), np.float32), times=times, guided=guided, unguided=unguided, guidance_scale=3.0
    )
    assert _count(lambda: list(denoise(backend, request))) == 3 * costs["denoiser"].flops
    import torch

    latents = torch.zeros(2, 4, 12, 8)
    assert _count(lambda: backend.vae(latents)) == 2 * costs["vae"].flops


def test_no_measured_result_beats_its_floor():
    """Every latency result of the folder that says what its machine reached, or ran on a device of the sheet."""
    from mindomni_rt.benchmarks.results import all_results
    from mindomni_rt.benchmarks.roofline import measured_bound
    from mindomni_rt.memory.layers import STAGES

    rows = [(r, *m) for r in all_results() if (m := measured_bound(r, load_devices())) is not None]
    assert rows, "no result in the folder has a floor"
    for result, found, basis in rows:
        ran = [s for s in STAGES if result.median(s)]
        assert {"language", "denoiser", "vae"} <= set(ran)
        slow = {s: result.median(s) / found.floor[s] for s in ran if found.floor[s]}
        assert min(slow.values()) >= 1, (result.path.name, basis, slow)


@pytest.mark.parametrize(
    ("device", "scheme", "starts"),
    [("h200", "bf16", "27."), ("rtx4060", "bf16", "does not fit"), ("rtx4060", "w4a4+attn8", "8.")],
)
def test_memory_notes(device, scheme, starts):
    from mindomni_rt.benchmarks.roofline import memory_note

    note = memory_note(CONFIG, Workload(), load_devices().devices[device], scheme)
    assert note.startswith(starts)  # bf16: 24.9 GB of weights and 2 GB of buffers; 4 bits: swapped below 8.59 GB
    assert ("swaps" in note) == (device == "rtx4060" and scheme == "w4a4+attn8")
