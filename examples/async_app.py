"""asyncio: the event loop stays free while a thread runs the model. A task that is cancelled stops its request.

python examples/async_app.py
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence

import mindomni_rt
from mindomni_rt import AsyncPipeline, StepEvent

PROMPTS = (
    "draw (1 + 2) things of the colour of a lemon, shaped like a wheel",
    "draw (7 - 2) things of the colour of grass, shaped like a window",
)


async def heartbeat(beats: list[float]) -> None:
    """What else the application does; it would stand still if the model ran in the event loop."""
    while True:
        beats.append(asyncio.get_running_loop().time())
        await asyncio.sleep(0.005)


async def serve(model: str) -> None:
    beats = list[float]()
    pulse = asyncio.create_task(heartbeat(beats))
    async with AsyncPipeline(await asyncio.to_thread(mindomni_rt.load, model)) as pipe:
        results = await asyncio.gather(*(pipe.generate(prompt, seed=7) for prompt in PROMPTS))
        print(*(result.answer.strip() for result in results), sep="\n")
        async for event in pipe.stream(PROMPTS[0], seed=7):
            if isinstance(event, StepEvent) and event.step == event.total:
                print(f"streamed: {event.total} steps done")
        try:
            await asyncio.wait_for(pipe.generate(PROMPTS[0], num_inference_steps=1000), timeout=0.2)
        except TimeoutError:
            print("timed out, and the model is free again")
    pulse.cancel()
    print(f"{len(beats)} heartbeats meanwhile")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="a checkpoint or bundle; here the small model")
    asyncio.run(serve(parser.parse_args(arguments).model))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
