"""Clients of a load test: so many at once, some of which leave early; every answer is compared with the right one."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from .asks import Ask, of_base64

_TRIES = 50


@dataclass(kw_only=True)
class Tally:
    """What came of the requests."""

    outcomes: Counter[str] = field(default_factory=Counter)
    """"answered", "left", "refused" (429, tried again), "wrong", "lost"."""
    wrong: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    """Of answered requests, waiting for room included."""
    memory: list[float] = field(default_factory=list)
    """Bytes of the server's process, as its metrics report them, in the order of time."""


async def drive(
    url: str, asks: Sequence[Ask], right: Mapping[str, str], *, clients: int, leaving: float, seed: int
) -> Tally:
    """Sends all requests, `clients` at once; a share of `leaving` closes its connection at some moment."""
    tally, chance = Tally(), random.Random(seed)
    todo = [(ask, chance.uniform(0.0, 0.4) if chance.random() < leaving else None) for ask in asks]
    todo.reverse()
    every = max(1, len(todo) // 100)
    next_sample = [len(todo)]  # how many requests are left when memory is read next
    limits = httpx.Limits(max_connections=clients + 1)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits, trust_env=False) as http:

        async def client() -> None:
            while todo:
                ask, patience = todo.pop()
                await _one(http, ask, patience, right, tally)
                if len(todo) <= next_sample[0]:
                    next_sample[0] -= every
                    tally.memory.append(await _memory(http))

        await asyncio.gather(*(client() for _ in range(clients)))
    return tally


async def _one(
    http: httpx.AsyncClient, ask: Ask, patience: float | None, right: Mapping[str, str], tally: Tally
) -> None:
    began = time.perf_counter()
    for _ in range(_TRIES):
        try:
            async with asyncio.timeout(patience):
                status, found = await _answer(http, ask)
        except TimeoutError:
            tally.outcomes["left"] += 1
            return
        except (httpx.HTTPError, ValueError, KeyError, IndexError) as error:
            tally.outcomes["lost"] += 1
            tally.wrong.append(f"{ask.name}: {type(error).__name__} {error}")
            return
        if status == 429:
            tally.outcomes["refused"] += 1
            await asyncio.sleep(float(found))
            continue
        tally.seconds.append(time.perf_counter() - began)
        good = status == 200 and found == right[ask.name]
        tally.outcomes["answered" if good else "wrong"] += 1
        if not good:
            tally.wrong.append(f"{ask.name}: {status} {found[:200]}")
        return
    tally.outcomes["lost"] += 1


async def _answer(http: httpx.AsyncClient, ask: Ask) -> tuple[int, str]:
    """Status, and the answer's mark; for a refusal the seconds to wait, for an error its text."""
    async with http.stream("POST", ask.route, json=ask.body) as answer:
        text = (await answer.aread()).decode()
        if answer.status_code != 200:
            return answer.status_code, answer.headers.get("retry-after", text)
    return 200, _of_events(text) if ask.stream else _of_json(json.loads(text))


def _of_json(answer: Mapping[str, Any]) -> str:
    if "data" in answer:
        return of_base64(answer["data"][0]["b64_json"])
    return "text " + str(answer["choices"][0]["message"]["content"]).strip()


def _of_events(text: str) -> str:
    """The mark of the final image among server-sent events."""
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    for event in reversed(events):
        if event.get("type") == "image_generation.completed":
            return of_base64(event["b64_json"])
        if images := [i for c in event.get("choices", ()) for i in c["delta"].get("images", ())]:
            return of_base64(images[0]["image_url"]["url"])
    raise ValueError(f"no image in {text[-300:]!r}")


async def _memory(http: httpx.AsyncClient) -> float:
    return metrics((await http.get("/metrics")).text).get("process_resident_memory_bytes", 0.0)


def metrics(text: str) -> dict[str, float]:
    """Prometheus' text form: name with labels → value."""
    lines = (line.rpartition(" ") for line in text.splitlines() if line and not line.startswith("#"))
    return {name: float(value) for name, _, value in lines}
