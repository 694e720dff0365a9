"""Image rows for the vision model: one drawing, then several questions about it, all answers trained on."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pytest_inferencepio.tasks.drawing import (
    COLOURS,
    SHAPES,
    Thing,
    draw,
    draw_things,
    encode,
    image_prompt_ids,
    question,
)
from pytest_inferencepio.tasks.symbols import LOOK
from training.rows import ANSWER, Row
from training.save import image_processor

LENGTH = 160
KINDS = ("shape", "colour", "position")


class ImageRowMaker:
    """Batches of drawings with questions, a function of (seed, step)."""

    def __init__(self, tokenizer: Any, seed: int) -> None:
        """Tokenizes every question part once."""
        self.seed, self.processor = seed, image_processor()
        self.prefix = image_prompt_ids(tokenizer)
        self.end = tokenizer.eos_token_id
        self.rows: dict[tuple[str, str, str, int], Row] = {}
        for kind in KINDS:
            for shape in SHAPES:
                for colour in COLOURS:
                    for cell in range(9):
                        asked, answer = question(kind, Thing(shape, colour, cell))
                        left, right = encode(tokenizer, LOOK + asked), encode(tokenizer, answer)
                        row = left + right, [0.0] * len(left) + [ANSWER] * len(right)
                        self.rows[kind, shape, colour, cell] = row

    def row(self, rng: random.Random, things: list[Thing]) -> Row:
        """Questions in random order until the row is full; the rest is padding without weight."""
        tokens, weights = list(self.prefix), [0.0] * len(self.prefix)
        asked = [(kind, thing) for kind in KINDS for thing in things]
        rng.shuffle(asked)
        for kind, thing in asked:
            more = self.rows[kind, thing.shape, thing.colour, thing.cell]
            if len(tokens) + len(more[0]) <= LENGTH:
                tokens += more[0]
                weights += more[1]
        padding = LENGTH - len(tokens)
        return tokens + [self.end] * padding, weights + [0.0] * padding

    def batch(self, step: int, n_images: int) -> dict[str, Tensor]:
        """Model inputs and `weights` of this step."""
        rng = random.Random(self.seed * 2_000_003 + step)
        scenes = [draw_things(rng) for _ in range(n_images)]
        rows = [self.row(rng, things) for things in scenes]
        ids = torch.tensor([row[0] for row in rows])
        images = [draw(things, rng) for things in scenes]
        return {"input_ids": ids, "weights": torch.tensor([row[1] for row in rows]), **self.pixels(images)}

    def pixels(self, images: list[np.ndarray]) -> dict[str, Tensor]:
        """pixel_values and image_grid_thw as the shipped processor makes them."""
        return dict(self.processor(images=images, return_tensors="pt"))


def image_hidden(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Final hidden states of the multimodal forward, M-RoPE positions and DeepStack included."""
    ids = batch["input_ids"]
    return model.model(
        input_ids=ids,
        pixel_values=batch["pixel_values"],
        image_grid_thw=batch["image_grid_thw"],
        mm_token_type_ids=(ids == model.config.image_token_id).int(),
        use_cache=False,
    ).last_hidden_state
