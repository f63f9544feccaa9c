"""`mindomni bench COMMAND`: how fast, will it fit, how good."""

from __future__ import annotations

from collections.abc import Sequence

from mindomni_rt.commands import run_package

_COMMANDS = {  # name: (module of this package, what it does)
    "latency": ("latency.command", "one request, stage by stage, on this machine"),
    "compare": ("compare", "two results of one kind, latency or counts; exit code 1 where the second is worse"),
    "check": ("results", "whether a result file is complete; exit code 1 where it is not"),
    "peers": ("peers.command", "transformers, diffusers and onnxruntime beside ours, on the same weights"),
    "counts": ("counts", "operations, operators, bytes and graph nodes of a fixed request: no clock"),
    "quality": ("quality.command", "images in the formats of official evaluators"),
    "lossy": ("quality.lossy", "what each lossy option costs"),
    "roofline": ("roofline", "floors and predictions by device and precision"),
    "load": ("load.command", "a server under many clients, each answer checked"),
    "plan": ("plan", "what stays loaded within a memory budget"),
    "gpu": ("gpu.suite", "correctness, speed, memory and baselines on one GPU"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, 1 for a regression, 2 for a mistake in what was asked, 130 when interrupted."""
    commands = {name: (f"mindomni_rt.benchmarks.{module}", text) for name, (module, text) in _COMMANDS.items()}
    return run_package(arguments, "mindomni bench", __doc__, commands, extra="bench")
