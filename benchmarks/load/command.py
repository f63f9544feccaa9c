"""`mindomni bench load MODEL`: a server of the small model under many clients, each answer checked.

Starts `mindomni serve` on this machine, sends requests of four kinds, so many at once, and lets a share of the clients
leave early. Every answer must equal the same request alone, the server must account for every request, and its memory
must stay flat. Exit code 1 where one of these does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import numpy as np

import mindomni_rt

from ..machine import describe_machine, header
from ..results import check_out, write_json
from .asks import distinct_asks, expected, sequence
from .clients import Tally, drive, metrics
from .server import server

MOST_GROWTH = 0.05


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("model", help="a bundle or checkpoint that runs on the CPU, or demo (the small model)")
    parser.add_argument("--requests", type=int, default=2000, help="in all (default: 2000)")
    parser.add_argument("--clients", type=int, default=32, help="at once")
    parser.add_argument("--leaving", type=float, default=0.1, help="share of clients that leave early")
    parser.add_argument("--max-queue", type=int, default=24, help="the server's; fewer than clients, so some get 429")
    parser.add_argument("--seed", type=int, default=0, help="of the order of requests, and of who leaves when")
    parser.add_argument("--out", type=Path, help="a .json file")


def run(options: argparse.Namespace) -> int:
    """Prints a summary; 1 if a request was lost or mixed up, or memory grew."""
    check_out(options.out)
    result = measure(options)
    if options.out:
        write_json(options.out, result)
    found = complaints(result)
    outcomes = ", ".join(f"{count} {name}" for name, count in result["outcomes"].items())
    memory = result["memory"]
    sys.stdout.write(
        f"{options.requests} requests, {options.clients} at once: {outcomes} in {result['seconds']:.0f} s "
        f"({result['rate']:.1f}/s), memory {memory['early'] / 2**20:.0f} -> {memory['late'] / 2**20:.0f} MiB\n"
        + "".join(f"{line}\n" for line in found)
    )
    return int(bool(found))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the test. Raises MindOmniError where no server can be had."""
    asks = sequence(distinct_asks(), options.requests, options.seed)
    with _unwarned(), mindomni_rt.load(options.model, device="cpu") as pipe:
        right = {name: expected(pipe, ask) for name, ask in {ask.name: ask for ask in asks}.items()}
    with server(options.model, ["--device", "cpu", "--max-queue", str(options.max_queue)]) as url:
        began = time.perf_counter()
        tally = asyncio.run(
            drive(
                url,
                asks,
                right,
                clients=options.clients,
                leaving=options.leaving,
                seed=options.seed,
            )
        )
        seconds = time.perf_counter() - began
        counts = _settled(url)
    return _result(options, tally, seconds, counts)


@contextmanager
def _unwarned() -> Iterator[None]:
    """Sizes and lengths are the test's own choice, on which the user needs no warning."""
    log = logging.getLogger("mindomni_rt")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _settled(url: str) -> dict[str, float]:
    """The server's own counts, once the requests of clients that left have ended."""
    counts: dict[str, float] = {}
    for _ in range(100):
        last, counts = counts, metrics(httpx.get(f"{url}/metrics", trust_env=False).text)
        if _posted(last) == _posted(counts) and not counts["mindomni_queue_length"]:
            break
        time.sleep(0.2)
    return counts


def _posted(counts: dict[str, float]) -> float:
    return sum(n for name, n in counts.items() if name.startswith("mindomni_requests_total") and "/v1/" in name)


def _result(options: argparse.Namespace, tally: Tally, seconds: float, counts: dict[str, float]) -> dict[str, Any]:
    fifth = max(1, len(tally.memory) // 5)
    early, late = median(tally.memory[fifth : 2 * fifth] or tally.memory), median(tally.memory[-fifth:])
    percentiles = np.percentile(tally.seconds, (50, 90, 99)) if tally.seconds else (0.0, 0.0, 0.0)
    batches = counts.get("mindomni_batch_size_count", 0)
    head = header("load")
    return {
        **head,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "model": {"name": Path(options.model).name},
        "machine": describe_machine("cpu"),
        "versions": {**head["versions"], **{name: version(name) for name in ("fastapi", "uvicorn", "httpx")}},
        "requests": options.requests,
        "clients": options.clients,
        "leaving": options.leaving,
        "max_queue": options.max_queue,
        "seed": options.seed,
        "seconds": round(seconds, 3),
        "rate": round(options.requests / seconds, 3),
        "outcomes": dict(sorted(tally.outcomes.items())),
        "wrong": tally.wrong[:20],
        "latency_s": dict(zip(("p50", "p90", "p99"), (round(float(p), 4) for p in percentiles), strict=True)),
        "server": {
            "requests": {n: c for n, c in counts.items() if n.startswith("mindomni_requests_total")},
            "left_in_queue": counts["mindomni_queue_length"],
            "batches": batches,
            "requests_a_batch": round(counts.get("mindomni_batch_size_sum", 0) / max(batches, 1), 3),
            "counted": _posted(counts),
        },
        "memory": {"early": early, "late": late, "growth": round(late / early - 1, 4), "samples": tally.memory},
    }


def complaints(result: dict[str, Any]) -> list[str]:
    """What does not hold, one line each."""
    outcomes, found = result["outcomes"], list(result["wrong"])
    ended = outcomes.get("answered", 0) + outcomes.get("left", 0)
    if ended != result["requests"]:
        found.append(f"{result['requests'] - ended} requests were lost or mixed up")
    sent = ended + outcomes.get("refused", 0) + outcomes.get("wrong", 0)
    # A client may leave before the server has read its request, which then counts nowhere.
    if not sent - outcomes.get("left", 0) <= result["server"]["counted"] <= sent:
        found.append(f"the server counts {result['server']['counted']:.0f} requests, the clients sent {sent}")
    if result["server"]["left_in_queue"]:
        found.append(f"{result['server']['left_in_queue']:.0f} requests are still in the queue")
    if result["memory"]["growth"] > MOST_GROWTH:
        found.append(f"memory grew by {result['memory']['growth']:.1%}, more than {MOST_GROWTH:.0%}")
    return found
