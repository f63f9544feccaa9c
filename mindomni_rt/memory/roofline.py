"""The roofline of a request on one device: the cost model times the device's figures, as a floor and a prediction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..checkpoint.config import ModelConfig
from ..devices.table import Device
from .costs import SCHEMES, Op, Scheme, StageCost, request_costs
from .layers import STAGES, Workload

_DECODE = {"w8a8": "w8a8", "w8a8+attn8": "w8a8", "w4a4+attn8": "w4a16"}  # decoding quantizes weights alone at 4 bits
_VAE = {"fp32": "fp32"}  # elsewhere in 16 bits: convolutions are not quantized


@dataclass(frozen=True, kw_only=True)
class Bound:
    """Seconds of one request on one device: floor and prediction by stage (the two halves of `language` joined)."""

    device: str
    scheme: str
    floor: Mapping[str, float]
    prediction: Mapping[str, float]

    @property
    def floor_total(self) -> float:
        return sum(self.floor.values())

    @property
    def prediction_total(self) -> float:
        return sum(self.prediction.values())


def kernel_seconds(op: Op, scheme: Scheme, tflops: Mapping[str, float | None], speed: float) -> float:
    """One kernel at a roofline: the longer of its operations at the peak of its kind and its bytes at `speed` GB/s."""
    peak = tflops.get("attention" if op.kind == "attention" else "gemm") if op.flops else None
    return max(op.flops / (peak * 1e12) if peak else 0.0, scheme.bytes(op) / (speed * 1e9)) * op.repeat


def stage_scheme(stage: str, scheme: str) -> Scheme:
    """The precisions of one stage under a named choice for the model."""
    if stage == "vae":
        return SCHEMES[_VAE.get(scheme, "bf16")]
    if stage in ("vision", "connector"):
        return SCHEMES[scheme if scheme in ("fp32", "bf16", "bf16-eager") else "bf16"]
    return SCHEMES[_DECODE.get(scheme, scheme) if stage.startswith("language") else scheme]


def bound(
    config: ModelConfig, work: Workload, device: Device, scheme: str, efficiency: Mapping[str, float]
) -> Bound | None:
    """Floor and prediction of a request; None where the device lacks the precision."""
    if device.best(SCHEMES[scheme].gemm) is None or device.best(SCHEMES[scheme].attention) is None:
        return None
    floor, prediction = dict.fromkeys(STAGES, 0.0), dict.fromkeys(STAGES, 0.0)
    for cost in request_costs(config, work, fused=SCHEMES[scheme].fused):
        stage = cost.name.split(".")[0]
        chosen = stage_scheme(cost.name, scheme)
        floor[stage] += _seconds(cost, chosen, _peaks(device, chosen, None), device.speed)
        prediction[stage] += _seconds(
            cost, chosen, _peaks(device, chosen, efficiency), device.speed * efficiency["memory"]
        )
    return Bound(device=device.name, scheme=scheme, floor=floor, prediction=prediction)


def _seconds(cost: StageCost, scheme: Scheme, tflops: Mapping[str, float | None], speed: float) -> float:
    return cost.units * sum(kernel_seconds(op, scheme, tflops, speed) for op in cost.ops)


def _peaks(device: Device, scheme: Scheme, efficiency: Mapping[str, float] | None) -> dict[str, float | None]:
    """TFLOP/s by kind of kernel; with efficiencies what software may reach, else the ceiling."""

    def peak(precisions: tuple[str, ...]) -> float | None:
        if efficiency is None:
            return device.best(precisions)
        bits = {"fp32": 16, "bf16": 16, "fp8": 8, "fp4": 4}[precisions[0]]
        return device.reached(precisions, efficiency[f"gemm{bits}"])

    return {"gemm": peak(scheme.gemm), "attention": peak(scheme.attention)}
