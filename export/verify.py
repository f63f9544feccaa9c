"""Does a bundle compute what the checkpoint does? Each stage on its own backend, against the reference in float32."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mindomni_rt.backends.base import DenoiseRequest, LanguageRequest
from mindomni_rt.backends.compiled.backend import CompiledBackend
from mindomni_rt.backends.torch.backend import TorchBackend, load_torch
from mindomni_rt.bundle.manifest import is_bundle, read_manifest
from mindomni_rt.checkpoint.config import ModelConfig
from mindomni_rt.errors import BadBundleError, BadRequestError, MindOmniError
from mindomni_rt.inputs.images import ImagePatches
from mindomni_rt.inputs.positions import mrope_positions
from mindomni_rt.loading import load
from mindomni_rt.sampling.denoise import denoise
from mindomni_rt.sampling.schedule import timesteps

# Relative error allowed. 16 bits: by rounding. 8 and 4 bits: a bound that tells a broken engine from a coarse one; what
# rounding costs in pictures is for a benchmark to say.
BOUNDS = {
    "fp32": 1e-4,
    "fp16": 2e-2,
    "bf16": 2e-2,
    "mixed": 2e-2,
    "int8wo": 0.1,
    "int8": 0.3,
    "fp8": 0.3,
    "int4": 0.5,
    "nvfp4": 0.5,
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One output. cosine and error (‖a − b‖ / ‖b‖) are None where there was nothing to compare with; passed then means
    that the stage ran and its output is finite."""

    stage: str
    output: str
    precision: str
    cosine: float | None
    error: float | None
    bound: float
    passed: bool


def verify(bundle: Path, checkpoint: Path | None = None, device: str = "auto") -> list[Row]:
    """Runs every stage of a bundle; with a checkpoint, against its float32 reference on the CPU.

    Inputs are random but fixed; each stage gets the reference's own input, so that an error shows where it arises.
    Raises BadBundleError, UnsupportedDeviceError, BadCheckpointError.
    """
    if (bundle / "mllm").is_dir() and not is_bundle(bundle):
        raise BadBundleError(f"{bundle} is a checkpoint: verify takes a bundle, and the checkpoint as --against")
    read_manifest(bundle)
    backend = load(bundle, device=device).backend
    assert isinstance(backend, CompiledBackend)
    reference = load_torch(checkpoint, "cpu", "float32") if checkpoint else None
    if reference is not None:
        _same_model(backend.config, reference.config, checkpoint)
    rows = []
    for (stage, output, found), expected in zip(
        _run(backend, reference), _expected(reference), strict=False
    ):  # endless
        rows.append(_row(backend, stage, output, found, expected))
    return rows


def _same_model(bundle: ModelConfig, checkpoint: ModelConfig, where: Path | None) -> None:
    """Raises BadRequestError naming the parts in which two models differ in shape."""
    parts = [
        f.name
        for f in fields(bundle)
        if f.name != "recommended" and getattr(bundle, f.name) != getattr(checkpoint, f.name)
    ]
    if parts:
        raise BadRequestError(
            f"--against {where}: another model than the bundle's; {', '.join(parts)} differ. Give the checkpoint "
            "that it was built from"
        )


def _row(backend: CompiledBackend, stage: str, output: str, found: Any, expected: Any) -> Row:
    precision = backend.manifest.graphs[stage].precision
    a = _host(backend, found).astype(np.float64).ravel()
    bound = BOUNDS[precision]
    if expected is None:
        finite = bool(np.isfinite(a).all())
        return Row(stage=stage, output=output, precision=precision, cosine=None, error=None, bound=bound, passed=finite)
    b = np.asarray(expected, np.float64).ravel()
    error = float(np.linalg.norm(a - b) / np.linalg.norm(b))
    cosine = float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
    passed = bool(np.isfinite(error) and error <= bound)
    return Row(stage=stage, output=output, precision=precision, cosine=cosine, error=error, bound=bound, passed=passed)


def _host(backend: Any, value: Any) -> NDArray[np.float32]:
    return value if isinstance(value, np.ndarray) else np.asarray(backend.numpy(value))


def _expected(reference: TorchBackend | None) -> Iterator[Any]:
    if reference is None:
        while True:
            yield None
    for _, _, value in _run(reference, reference):
        yield _host(reference, value)


@dataclass(frozen=True)
class _Inputs:
    patches: ImagePatches
    language: LanguageRequest
    hidden: NDArray[np.float32]
    condition: NDArray[np.float32]
    latents: NDArray[np.float32]


def _inputs(backend: Any, reference: TorchBackend | None) -> _Inputs:
    """Fixed random inputs; hidden states and condition are the reference's own where there is one."""
    config = backend.config
    draw = np.random.default_rng(0)
    side = 2 * config.vision.window_size // config.vision.patch_size + 2  # whole windows and partial ones
    patches = draw.standard_normal((side * side, config.vision.patch_dim)).astype(np.float32)
    text = min(config.language.vocab_size, config.language.image_token_id, config.language.vision_start_token_id)
    ids = draw.integers(0, text, 40)
    positions, following = mrope_positions(ids, [], config.language)
    language = LanguageRequest(token_ids=ids, positions=positions, next_position=following)
    hidden = draw.standard_normal((1, len(ids), config.connector.input_size)).astype(np.float32)
    condition = draw.standard_normal((1, len(ids), config.decoder.stack.hidden_size)).astype(np.float32)
    if reference is not None:
        states = reference.language(language).hidden()
        hidden, condition = reference.numpy(states), reference.numpy(reference.connector(states))
    latents = draw.standard_normal((1, config.decoder.latent_channels, 32, 32)).astype(np.float32)
    return _Inputs(ImagePatches(patches, (1, side, side)), language, hidden, condition, latents)


def _run(backend: Any, reference: TorchBackend | None) -> Iterator[tuple[str, str, Any]]:
    """(stage, output, value) of every stage."""
    inputs = _inputs(backend, reference)

    def put(array: NDArray[np.float32]) -> Any:
        return backend.put(array, backend.dtype) if isinstance(backend, CompiledBackend) else backend.tensors(array)[0]

    yield "vision", "embeds", backend.vision(inputs.patches)
    yield "language", "hidden", backend.language(inputs.language).hidden()
    yield "connector", "condition", backend.connector(put(inputs.hidden))
    times = timesteps(2)
    tokens = inputs.latents.shape[-2] * inputs.latents.shape[-1] // backend.config.decoder.patch_size**2
    prefix = backend.prefix(put(inputs.condition), times[:-1], tokens)
    kv = prefix if isinstance(backend, CompiledBackend) else prefix.kv
    for name in ("keys", "values", "time_keys", "time_values"):
        yield "prefix", name, getattr(kv, name)
    loop = DenoiseRequest(
        latents=inputs.latents, times=times, guided=prefix, unguided=None, guidance_scale=1.0, first_step="full"
    )
    for state in denoise(backend, loop):
        yield "denoiser", f"velocity {state.step}", backend.numpy(state.velocity)
    latents = inputs.latents * np.float32(backend.config.vae.scaling_factor)
    yield "vae", "pixels", backend.vae(latents if isinstance(backend, CompiledBackend) else backend.tensors(latents)[0])


def table(rows: list[Row]) -> str:
    """Rows as aligned text."""
    lines = [f"{'stage':10} {'output':12} {'precision':9} {'cosine':>10} {'error':>10} {'bound':>8}  result"]
    for row in rows:
        cosine = "-" if row.cosine is None else f"{row.cosine:.6f}"
        error = "-" if row.error is None else f"{row.error:.2e}"
        result = "FAIL" if not row.passed else "ran" if row.error is None else "pass"
        lines.append(
            f"{row.stage:10} {row.output:12} {row.precision:9} {cosine:>10} {error:>10} {row.bound:8.0e}  {result}"
        )
    return "\n".join(lines)


def check(rows: list[Row]) -> None:
    """Raises MindOmniError naming the stages that missed."""
    missed = sorted({row.stage for row in rows if not row.passed})
    if missed:
        raise MindOmniError(f"these stages miss their bounds: {', '.join(missed)}")
