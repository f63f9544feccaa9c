"""A bundle's manifest as text: its graphs, and its bytes by type and by stage."""

from __future__ import annotations

from collections import Counter

from mindomni_rt.bundle.contracts import graph_specs
from mindomni_rt.bundle.manifest import GraphEntry, Manifest
from mindomni_rt.stages import STAGES


def describe(manifest: Manifest) -> str:
    """A manifest as a table. A data file that several graphs share is counted once, for the first that names it."""
    targets = ", ".join(manifest.targets) or "any device"
    lines = [
        f"format {manifest.format} · {manifest.runtime} {manifest.runtime_version} · {targets} · {manifest.dtype} · "
        f"profile {manifest.profile.name}",
        f"{'graph':15} {'file':22} {'precision':9} {'MB':>9} {'build s':>8} {'weight error':>12}  attention",
    ]
    held = _held(manifest)
    for name, graph in _in_order(manifest):
        report = graph.report
        seconds = report.get("build_seconds", report.get("export_seconds", 0.0))
        error = f"{report['weight_error']:.4f}" if "weight_error" in report else "-"
        attention = "-"
        if report.get("attention"):
            attention = f"{report['attention']} {'fused' if report['fused_attention'] else 'decomposed'}"
        size = held[name] / 1e6
        lines.append(
            f"{name:15} {graph.file:22} {graph.precision:9} {size:9.1f} {seconds:8.1f} {error:>12}  {attention}"
        )
    stages = {stage: sum(held[n] for n, g in manifest.graphs.items() if g.stage == stage) for stage in STAGES}
    lines.append("by stage, MB: " + ", ".join(f"{stage} {size / 1e6:.1f}" for stage, size in stages.items()))
    lines += _types(manifest)
    total = sum(entry.bytes for entry in manifest.files.values())
    lines.append(f"{len(manifest.files)} files, {total / 1e6:.1f} MB (data that graphs share is counted once)")
    return "\n".join(lines)


def _in_order(manifest: Manifest) -> list[tuple[str, GraphEntry]]:
    """Graphs in the order of the contracts: a manifest read from a file has them sorted by name."""
    order = list(graph_specs(manifest.model))
    return sorted(manifest.graphs.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order))


def _held(manifest: Manifest) -> dict[str, int]:
    """Bytes of each graph's files, shared ones for the first graph."""
    seen: set[str] = set()
    found = {}
    for name, graph in _in_order(manifest):
        files = [f for f in dict.fromkeys(graph.files) if f not in seen]
        seen.update(files)
        found[name] = sum(manifest.files[f].bytes for f in files)
    return found


def _types(manifest: Manifest) -> list[str]:
    """One line a stage: its graphs' tensors by stored type, as the build read them back."""
    lines = []
    for stage in STAGES:
        found: Counter[str] = Counter()
        for _, graph in _in_order(manifest):
            if graph.stage == stage:
                found.update(graph.report.get("bytes_by_type", {}))
        if found:
            types = ", ".join(f"{kind} {size / 1e6:.1f}" for kind, size in found.most_common())
            lines.append(f"{stage} weights, MB by type, each graph's own count: {types}")
    return lines
