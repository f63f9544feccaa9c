"""`python -m benchmarks COMMAND`: how fast, will it fit, how good."""

from __future__ import annotations

from collections.abc import Sequence

from mindomni_rt.commands import run_package

_COMMANDS = {
    "latency": ("mindomni_rt.benchmarks.latency.command", "one request, stage by stage, on this machine"),
    "compare": (
        "mindomni_rt.benchmarks.compare",
        "two results of one kind, latency or counts; exit code 1 where the second is worse",
    ),
    "check": ("mindomni_rt.benchmarks.results", "whether a result file is complete; exit code 1 where it is not"),
    "peers": (
        "mindomni_rt.benchmarks.peers.command",
        "transformers, diffusers and onnxruntime beside ours, on the same weights",
    ),
    "counts": (
        "mindomni_rt.benchmarks.counts",
        "operations, operators, bytes and graph nodes of a fixed request: no clock",
    ),
    "quality": ("mindomni_rt.benchmarks.quality.command", "images in the formats of official evaluators"),
    "lossy": ("mindomni_rt.benchmarks.quality.lossy", "what each lossy option costs"),
    "roofline": ("mindomni_rt.benchmarks.roofline", "floors and predictions by device and precision"),
    "load": ("mindomni_rt.benchmarks.load.command", "a server under many clients, each answer checked"),
    "plan": ("mindomni_rt.benchmarks.plan", "what stays loaded within a memory budget"),
    "gpu": (
        "mindomni_rt.benchmarks.gpu.suite",
        "correctness, speed, memory and baselines on one GPU",
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, 1 for a regression, 2 for a mistake in what was asked, 130 when interrupted."""
    return run_package(arguments, "python -m benchmarks", __doc__, _COMMANDS, extra="bench")
