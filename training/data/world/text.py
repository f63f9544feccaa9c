"""What is said about scenes: instructions that need arithmetic and knowledge, thoughts, answers, questions.

Held out are a fifth of all scenes (`Scene.held_out`) and a fifth of all sums (`Sum.held_out`): reinforcement learning
never asks for them, evaluation asks for nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .scene import COLOURS, COUNTS, SHAPES, Scene

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
COLOUR_CLUES = {
    "a tomato": "red",
    "blood": "red",
    "a strawberry": "red",
    "grass": "green",
    "a frog": "green",
    "a cucumber": "green",
    "the sea": "blue",
    "the sky": "blue",
    "a sapphire": "blue",
    "a lemon": "yellow",
    "the sun": "yellow",
    "a canary": "yellow",
}
SHAPE_CLUES = {
    "a wheel": "circle",
    "a coin": "circle",
    "a clock": "circle",
    "a window": "square",
    "a tile": "square",
    "a napkin": "square",
    "a tent": "triangle",
    "a pyramid": "triangle",
    "a sail": "triangle",
    "a plus sign": "cross",
    "a crossroads": "cross",
    "a hospital sign": "cross",
}
CHANGES = {"as many": 0, "one more": 1, "one fewer": -1}
QUESTIONS = ("how many things are there?", "what colour are they?", "what shape are they?", "describe the picture.")


@dataclass(frozen=True, order=True)
class Sum:
    """left plus or minus right, between 1 and 6."""

    left: int
    sign: str
    right: int

    @property
    def value(self) -> int:
        return self.left + self.right if self.sign == "+" else self.left - self.right

    @property
    def held_out(self) -> bool:
        return (self.left + 3 * self.right + (self.sign == "-")) % 5 == 0

    def __str__(self) -> str:
        return f"{self.left} {self.sign} {self.right}"


def all_sums() -> list[Sum]:
    """Every sum of two digits whose value is a count."""
    found = [Sum(a, sign, b) for a in range(10) for sign in "+-" for b in range(10)]
    return [s for s in found if s.value in COUNTS]


@dataclass(frozen=True)
class Task:
    """An instruction to draw, what a right thought and a right answer to it say, and the scene it means."""

    instruction: str
    thought: str
    answer: str
    scene: Scene
    source: Scene | None = None  # shown as reference picture


def caption(scene: Scene) -> str:
    """The short one: "three yellow circles"."""
    plural = "" if scene.count == 1 else "es" if scene.shape == "cross" else "s"
    return f"{NUMBERS[scene.count]} {scene.colour} {scene.shape}{plural}"


def description(scene: Scene) -> str:
    """The long one."""
    return f"{caption(scene)} on a white square, arranged like the pips of a die"


def clues(scene: Scene, draw: np.random.Generator) -> tuple[str, str]:
    """Something of the scene's colour and something of its shape."""
    colours = [clue for clue, colour in COLOUR_CLUES.items() if colour == scene.colour]
    shapes = [clue for clue, shape in SHAPE_CLUES.items() if shape == scene.shape]
    return colours[draw.integers(len(colours))], shapes[draw.integers(len(shapes))]


def riddle(scene: Scene, draw: np.random.Generator, held_out: bool | None = None) -> Task:
    """A scene asked for in sums and clues. held_out: only sums that are, or are not, held out."""
    sums = [s for s in all_sums() if s.value == scene.count and held_out in (None, s.held_out)]
    total = sums[draw.integers(len(sums))]
    colour, shape = clues(scene, draw)
    instruction = (
        f"draw ({total}) things of the colour of {colour}, shaped like {shape}",
        f"i want ({total}) things, shaped like {shape} and of the colour of {colour}",
    )[draw.integers(2)]
    return Task(instruction, thought(total, colour, shape), caption(scene), scene)


def thought(total: Sum, colour: str, shape: str, value: int | None = None, says: tuple[str, str] | None = None) -> str:
    """The steps from riddle to answer; value and says replace what is right by something else."""
    value = total.value if value is None else value
    is_colour, is_shape = says or (COLOUR_CLUES[colour], SHAPE_CLUES[shape])
    return f"{total} = {value}. {colour} is {is_colour}. {shape} is a {is_shape}."


def edit(scene: Scene, draw: np.random.Generator) -> Task:
    """A change of a reference picture that leads to `scene`."""
    change = [name for name, delta in CHANGES.items() if scene.count - delta in COUNTS]
    name = change[draw.integers(len(change))]
    other = list(COLOURS)[draw.integers(len(COLOURS))]
    recoloured = other != scene.colour
    source = Scene(scene.count - CHANGES[name], other, scene.shape)
    clue, _ = clues(scene, draw)
    colour = f"in the colour of {clue}" if recoloured else "in the same colour"
    steps = [f"there {'is' if source.count == 1 else 'are'} {caption(source)}."]
    if CHANGES[name]:
        steps.append(f"{name} is {NUMBERS[scene.count]}.")
    if recoloured:
        steps.append(f"{clue} is {scene.colour}.")
    return Task(f"the same, but {name} and {colour}", " ".join(steps), caption(scene), scene, source)


def question(scene: Scene, draw: np.random.Generator) -> tuple[str, str]:
    """A question about the picture of a scene, and its answer."""
    index = int(draw.integers(len(QUESTIONS)))
    return QUESTIONS[index], answer_to(QUESTIONS[index], scene)


def answer_to(asked: str, scene: Scene) -> str:
    """The right answer to one of QUESTIONS."""
    replies = (NUMBERS[scene.count], scene.colour, caption(scene).split()[-1], caption(scene))
    return replies[QUESTIONS.index(asked)]


def parse(text: str) -> Scene | None:
    """The scene that an answer in the form of `caption` names, or None."""
    words = text.strip().rstrip(".").split()
    if len(words) != 3 or words[0] not in NUMBERS[1:] or words[1] not in COLOURS:
        return None
    scene = [Scene(NUMBERS.index(words[0]), words[1], shape) for shape in SHAPES]
    return next((s for s in scene if caption(s) == " ".join(words)), None)


def slip(right: str) -> tuple[str, Scene]:
    """A riddle's thought as it goes wrong in the prior, with the answer that follows from it.

    The mistakes are systematic, so that greedy decoding is wrong too and reinforcement learning has to change which
    answer is likeliest, not sharpen it: differences come out one too large, and every other clue is taken for its
    neighbour.
    """
    total, colour, shape = right.split(". ")[:3]
    left, _, value = total.partition(" = ")
    number = int(value)
    if "-" in left:
        number = number % len(COUNTS) + 1
    clue, _, is_colour = colour.partition(" is ")
    if list(COLOUR_CLUES).index(clue) % 2:
        is_colour = _next(list(COLOURS), is_colour)
    thing, _, is_shape = shape.rstrip(".").partition(" is a ")
    if list(SHAPE_CLUES).index(thing) % 2:
        is_shape = _next(list(SHAPES), is_shape)
    return f"{left} = {number}. {clue} is {is_colour}. {thing} is a {is_shape}.", Scene(number, is_colour, is_shape)


def _next(names: list[str], name: str) -> str:
    return names[(names.index(name) + 1) % len(names)]


def words() -> list[str]:
    """Every text of the world once, for a tokenizer to learn its vocabulary from."""
    draw = np.random.default_rng(0)
    out = ["0 1 2 3 4 5 6 7 8 9 + - = ( ) , . ? <think> </think> <answer> </answer>", *NUMBERS, *QUESTIONS]
    for scene in (Scene(n, c, s) for n in COUNTS for c in COLOURS for s in SHAPES):
        for task in (riddle(scene, draw), edit(scene, draw)):
            out += [task.instruction, task.thought, task.answer]
        out.append(description(scene))
    out += [*COLOUR_CLUES, *SHAPE_CLUES, *CHANGES, "in the same colour", "the same picture", "there is"]
    return out
