"""Previews while the image is painted, and a second thread that cancels the request.

python examples/preview_and_cancel.py --out out/previews
"""

from __future__ import annotations

import argparse
import threading
from collections.abc import Sequence
from pathlib import Path

import mindomni_rt
from mindomni_rt import GenerationCancelled, ImageEvent, StepEvent

PROMPT = "i want (2 + 4) things, shaped like a tent and of the colour of the sea"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="a checkpoint or bundle; here the small model")
    parser.add_argument("--out", type=Path, default=Path("out/previews"), help="folder for the pictures")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    pipe = mindomni_rt.load(options.model)

    for event in pipe.stream(PROMPT, seed=7, preview_every=3):
        if isinstance(event, StepEvent) and event.preview:
            event.preview[0].save(options.out / f"step-{event.step:02d}.png")
            print(f"preview after step {event.step} of {event.total}")
        elif isinstance(event, ImageEvent):
            event.result.images[0].save(options.out / "image.png")

    # A "stop" button: any thread may set the event; the request ends at the next token or step.
    stop = threading.Event()
    reached = threading.Event()

    def button() -> None:
        reached.wait()
        stop.set()

    presser = threading.Thread(target=button)
    presser.start()
    try:
        for event in pipe.stream(PROMPT, num_inference_steps=500, seed=7, cancel=stop):
            if isinstance(event, StepEvent) and event.step == 5:
                reached.set()
                presser.join()
    except GenerationCancelled:
        print("cancelled; the pipeline is ready for the next request")
    finally:
        reached.set()
    again = pipe.generate(PROMPT, seed=7)
    print(again.answer.strip())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
