"""The stages as nodes of a graph, as in ComfyUI and other node editors: a node runs only if its inputs changed.

Think -> Connect -> Paint -> Decode. Changing the seed of the noise runs Paint and Decode alone.

python examples/graph.py --out out/graph
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mindomni_rt
from mindomni_rt import Pipeline
from mindomni_rt.inputs.images import to_pil
from mindomni_rt.request import Request
from mindomni_rt.sampling.random import batch_noise


def result_of(events: Generator[Any, None, Any]) -> Any:
    """Runs a stage that reports events and returns what it returns."""
    while True:
        try:
            next(events)
        except StopIteration as stop:
            return stop.value


@dataclass
class Graph:
    """Nodes by name. Each keeps its last output, with the inputs that made it."""

    pipe: Pipeline
    kept: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    ran: list[str] = field(default_factory=list)

    def node(self, name: str, inputs: Any, run: Callable[[], Any]) -> Any:
        """The kept output if `inputs` equal the last ones, else a new one."""
        if name not in self.kept or self.kept[name][0] != inputs:
            self.kept[name] = (inputs, run())
            self.ran.append(name)
        return self.kept[name][1]

    def run(self, request: Request, seed: int) -> Any:
        """A picture of the request, painted from the noise of `seed`. `ran` names the nodes that had to run."""
        self.ran, request = [], self.pipe.complete(request)
        text = (request.prompt, request.think, request.max_new_tokens)
        thought = self.node("think", text, lambda: result_of(self.pipe.think(request)))
        shape = (request.height, request.width, request.num_inference_steps)
        prefix = self.node("connect", (text, shape), lambda: self.pipe.connect(thought, request))
        painting = (text, shape, seed)
        # guidance_scale=1 needs no negative branch; otherwise pass pipe.connect_negative(request) in place of None.
        noise = batch_noise(seed, 1, request.latent_shape[1:])
        latents = self.node("paint", painting, lambda: result_of(self.pipe.paint(request, noise, prefix, None)))
        return self.node("decode", painting, lambda: to_pil(self.pipe.decode(latents))[0])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="a checkpoint or bundle; here the small model")
    parser.add_argument("--out", type=Path, default=Path("out/graph"), help="folder for the pictures")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    graph = Graph(mindomni_rt.load(options.model))
    request = Request(
        prompt="draw (1 + 2) things of the colour of a lemon, shaped like a wheel",
        guidance_scale=1.0, max_new_tokens=48,
    )  # fmt: skip
    more_steps = replace(request, num_inference_steps=20)
    for name, current, seed in (("first", request, 7), ("reseeded", request, 8), ("more-steps", more_steps, 8)):
        graph.run(current, seed).save(options.out / f"{name}.png")
        print(f"{name}: ran {', '.join(graph.ran)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
