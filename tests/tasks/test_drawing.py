"""Drawings: pixels say what the answers say."""

from __future__ import annotations

import random

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from pytest_inferencepio.tasks.drawing import (
    COLOURS,
    IMAGE_TASKS,
    SHAPES,
    SIDE,
    Drawing,
    Thing,
    draw,
    draw_things,
    question,
    shape_mask,
)


def cell_of(image: np.ndarray, cell: int) -> np.ndarray:
    rows, columns = (
        np.array_split(np.arange(SIDE), 3)[cell // 3],
        np.array_split(np.arange(SIDE), 3)[cell % 3],
    )
    return image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def is_coloured(image: np.ndarray, colour: str) -> np.ndarray:
    return (image == np.array(COLOURS[colour])).all(-1)


@pytest.mark.parametrize("seed", range(6))
def test_each_thing_is_drawn_in_its_cell_and_nowhere_else(seed: int) -> None:
    rng = random.Random(seed)
    things = draw_things(rng)
    image = draw(things, rng)
    assert image.shape == (SIDE, SIDE, 3)
    assert image.dtype == np.uint8
    for cell in range(9):
        here = [thing for thing in things if thing.cell == cell]
        for colour in COLOURS:
            share = is_coloured(cell_of(image, cell), colour).mean()
            expected = any(thing.colour == colour for thing in here)
            assert (share > 0.05) == expected, (cell, colour, share)


def test_things_differ_in_kind_and_place() -> None:
    rng = random.Random(1)
    for _ in range(50):
        things = draw_things(rng)
        assert len({(thing.shape, thing.colour) for thing in things}) == len(things)
        assert len({thing.cell for thing in things}) == len(things)


def test_no_two_shapes_cover_the_same_pixels() -> None:
    y, x = np.mgrid[-20:21, -20:21]
    masks = [shape_mask(shape, x, y, 15.0) for shape in SHAPES]
    for i, one in enumerate(masks):
        for other in masks[:i]:
            assert (one & other).sum() / (one | other).sum() < 0.85


def test_unknown_shape_and_question_name_what_there_is() -> None:
    with pytest.raises(ValueError, match="No shape is called 'star'; there are circle, square"):
        shape_mask("star", np.zeros(1), np.zeros(1), 1.0)
    with pytest.raises(ValueError, match="No question is of kind 'size'; there are shape, colour, position"):
        question("size", Thing("ring", "red", 0))


@pytest.mark.parametrize("task", IMAGE_TASKS, ids=lambda task: task.name)
def test_a_seed_fixes_pixels_and_questions(task: Drawing, tokenizer: PreTrainedTokenizerBase) -> None:
    first, again = task.examples(tokenizer, 3, seed=9), task.examples(tokenizer, 3, seed=9)
    for one, two in zip(first, again, strict=True):
        assert (one.prompt_ids, one.answer_ids) == (two.prompt_ids, two.answer_ids)
        assert one.image is not None
        assert np.array_equal(one.image, two.image)


def test_the_answer_to_a_colour_question_is_in_the_asked_cell(tokenizer: PreTrainedTokenizerBase) -> None:
    places = {Thing("ring", "red", cell).place: cell for cell in range(9)}
    for example in Drawing("colour").examples(tokenizer, 12, seed=4):
        asked = tokenizer.decode(example.prompt_ids).split("colour ")[1].removesuffix(":")
        assert example.image is not None
        assert is_coloured(cell_of(example.image, places[asked]), tokenizer.decode(example.answer_ids)).any()


def test_prompts_hold_64_image_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    (example,) = Drawing("shape").examples(tokenizer, 1, seed=0)
    assert example.prompt_ids.count(tokenizer.convert_tokens_to_ids("<|image_pad|>")) == 64
