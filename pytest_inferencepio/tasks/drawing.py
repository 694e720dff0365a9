"""Drawn shapes: what is where, in which colour. Pure numpy, so the pixels are the same on every machine."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np

from pytest_inferencepio.tasks.examples import Example, Task, task_random
from pytest_inferencepio.tasks.symbols import LOOK

SIDE = 128
PIXELS_PER_TOKEN = 16
SHAPES = ("circle", "square", "triangle", "cross", "ring", "diamond")
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 80, 230),
    "yellow": (235, 220, 50),
    "purple": (160, 60, 200),
    "white": (245, 245, 245),
}
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")


@dataclass(frozen=True)
class Thing:
    """One drawn shape in a cell (0..8, reading order)."""

    shape: str
    colour: str
    cell: int

    @property
    def place(self) -> str:
        """The cell in words."""
        return f"{ROWS[self.cell // 3]} {COLUMNS[self.cell % 3]}"


def draw_things(rng: random.Random, most: int = 4) -> list[Thing]:
    """1 to `most` shapes in different cells, no two alike in both shape and colour."""
    n = rng.randint(1, most)
    kinds = rng.sample([(shape, colour) for shape in SHAPES for colour in COLOURS], n)
    return [Thing(*kind, cell) for kind, cell in zip(kinds, rng.sample(range(9), n), strict=True)]


def shape_mask(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Whether each offset (x, y) in pixels from the centre is inside the shape; bool, broadcast of x and y."""
    ax, ay = abs(x), abs(y)
    match shape:
        case "circle":
            return x**2 + y**2 <= radius**2
        case "square":
            return np.maximum(ax, ay) <= 0.85 * radius
        case "triangle":
            return (y <= 0.8 * radius) & (y >= 2.0 * ax - radius)
        case "cross":
            return (np.minimum(ax, ay) <= 0.3 * radius) & (np.maximum(ax, ay) <= radius)
        case "ring":
            square = x**2 + y**2
            return (square <= radius**2) & (square >= (0.55 * radius) ** 2)
        case "diamond":
            return ax + ay <= 1.1 * radius
    raise ValueError(f"No shape is called {shape!r}; there are {', '.join(SHAPES)}.")


def draw(things: list[Thing], rng: random.Random) -> np.ndarray:
    """uint8 image (128, 128, 3): a dim background with noise, each shape jittered within its cell."""
    return draw_owned(things, rng)[0]


def draw_owned(things: list[Thing], rng: random.Random) -> tuple[np.ndarray, np.ndarray]:
    """The image, and int8 (128, 128) with each pixel's index in `things`, -1 for background."""
    noise = np.random.default_rng(rng.getrandbits(32)).integers(0, 24, (SIDE, SIDE, 1))
    image = np.broadcast_to(rng.randint(10, 70) + noise, (SIDE, SIDE, 3)).astype(np.uint8)
    owner = np.full((SIDE, SIDE), -1, dtype=np.int8)
    rows, columns = np.ogrid[0:SIDE, 0:SIDE]
    cell = SIDE / 3
    for index, thing in enumerate(things):
        radius = rng.uniform(11, 17)
        slack = cell / 2 - radius
        x = columns - (thing.cell % 3 + 0.5) * cell - rng.uniform(-slack, slack)
        y = rows - (thing.cell // 3 + 0.5) * cell - rng.uniform(-slack, slack)
        owner[shape_mask(thing.shape, x, y, radius)] = index
        image[owner == index] = COLOURS[thing.colour]
    return image, owner


def question(kind: str, thing: Thing) -> tuple[str, str]:
    """Question and answer texts; `kind` is shape, colour or position."""
    match kind:
        case "shape":
            return f"shape {thing.place}:", thing.shape
        case "colour":
            return f"colour {thing.place}:", thing.colour
        case "position":
            return f"position {thing.colour} {thing.shape}:", thing.place
    raise ValueError(f"No question is of kind {kind!r}; there are shape, colour, position.")


def image_prompt_ids(tokenizer: Any) -> list[int]:
    """The image's placeholder tokens, 64 between the vision markers."""
    start, pad, end = tokenizer.convert_tokens_to_ids(["<|vision_start|>", "<|image_pad|>", "<|vision_end|>"])
    return [start, *[pad] * (SIDE // PIXELS_PER_TOKEN) ** 2, end]


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of plain text."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@dataclass(frozen=True)
class Drawing:
    """One question about a drawing of 1 to `most` shapes."""

    kind: str
    most: int = 4

    @property
    def name(self) -> str:
        """image_shape, image_colour or image_position."""
        return f"image_{self.kind}"

    def examples(self, tokenizer: Any, n: int, seed: int) -> list[Example]:
        """`n` drawings with one question each."""
        rng = task_random(self.name, seed)
        return [self._example(tokenizer, rng) for _ in range(n)]

    def _example(self, tokenizer: Any, rng: random.Random) -> Example:
        things = draw_things(rng, self.most)
        asked, answer = question(self.kind, rng.choice(things))
        prompt = [*image_prompt_ids(tokenizer), *encode(tokenizer, LOOK + asked)]
        return Example(self.name, tuple(prompt), tuple(encode(tokenizer, answer)), image=draw(things, rng))


IMAGE_TASKS: tuple[Task, ...] = (Drawing("shape"), Drawing("colour"), Drawing("position"))
