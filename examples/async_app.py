"""asyncio: the event loop stays free while a worker thread runs the model. Leaving the loop early cancels the request.

python examples/async_app.py
"""

from __future__ import annotations

import argparse
import asyncio
import threading
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import mindomni_rt
from mindomni_rt import Event, ImageEvent, Pipeline, StepEvent

BUNDLE = Path(__file__).parents[1] / "assets" / "shapes-world-bundle"
SMALL: dict[str, Any] = dict(height=96, width=96, num_inference_steps=10, guidance_scale=1.0, max_new_tokens=48, seed=7)


async def astream(pipe: Pipeline, lock: asyncio.Lock, prompt: str, **options: Any) -> AsyncGenerator[Event, None]:
    """`pipe.stream` for asyncio. The lock makes requests wait for each other: a pipeline serves one at a time."""
    async with lock:
        cancel = threading.Event()
        events = pipe.stream(prompt, cancel=cancel, **options)
        try:
            while (event := await asyncio.to_thread(next, events, None)) is not None:
                yield event
        finally:
            cancel.set()
            events.close()


async def ask(pipe: Pipeline, lock: asyncio.Lock, name: str, prompt: str) -> str:
    """One client: returns the answer."""
    answer = ""
    async with aclosing(astream(pipe, lock, prompt, **SMALL)) as events:
        async for event in events:
            if isinstance(event, StepEvent) and event.step == event.total:
                print(f"{name}: {event.total} steps done")
            elif isinstance(event, ImageEvent):
                answer = event.result.answer.strip()
    return answer


async def heartbeat(beats: list[float]) -> None:
    """What else the application does; it would stand still if the model ran in the event loop."""
    while True:
        beats.append(asyncio.get_running_loop().time())
        await asyncio.sleep(0.005)


async def serve(model: str) -> None:
    pipe = await asyncio.to_thread(mindomni_rt.load, model)
    lock, beats = asyncio.Lock(), list[float]()
    pulse = asyncio.create_task(heartbeat(beats))
    prompts = {
        "first": "draw (1 + 2) things of the colour of a lemon, shaped like a wheel",
        "second": "draw (7 - 2) things of the colour of grass, shaped like a window",
    }
    answers = await asyncio.gather(*(ask(pipe, lock, name, prompt) for name, prompt in prompts.items()))
    pulse.cancel()
    print(*answers, sep="\n")
    print(f"{len(beats)} heartbeats meanwhile")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(BUNDLE), help="a checkpoint or bundle; here the small one")
    asyncio.run(serve(parser.parse_args(arguments).model))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
