"""Text as it is written, steps as they are done, then the image.

python examples/streaming.py --out out/streaming.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import mindomni_rt
from mindomni_rt import ImageEvent, StepEvent, TextEvent


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", default="draw (7 - 2) things of the colour of grass, shaped like a window")
    parser.add_argument("--model", default="demo", help="a checkpoint or bundle; here the small model")
    parser.add_argument("--out", type=Path, default=Path("out/streaming.png"))
    options = parser.parse_args(arguments)
    options.out.parent.mkdir(parents=True, exist_ok=True)

    pipe = mindomni_rt.load(options.model)
    events = pipe.stream(options.prompt, max_new_tokens=48, seed=7)
    kind = ""
    for event in events:
        match event:
            case TextEvent():
                if event.kind != kind and event.text.strip():
                    kind = event.kind
                    print(f"\n[{kind}] ", end="")
                print(event.text, end="", flush=True)
            case StepEvent():
                print(f"\nstep {event.step}/{event.total}", end="", flush=True)
            case ImageEvent(result):
                result.images[0].save(options.out)
                print(f"\n{options.out}: {result.answer.strip()}, {result.timings['total']:.2f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
