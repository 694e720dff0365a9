"""Seeded inputs: prompts, batches, images, requests that arrive as a Poisson process.

Prompts are held-out natural text (standard-library source) through the runner's tokenizer, because what
repeats in a text decides what prompt lookup or a routed expert does. Without a tokenizer (random weights at
full scale) they are random ids.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageDraw

from optimizations.serving import Request
from pytest_inferencepio.tasks.text import heldout_text

if TYPE_CHECKING:
    from optimizations.runner import Runner

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "black", "gray")
SHAPES = ("rectangle", "ellipse")


def token_ids(runner: Runner, n_tokens: int, seed: int = 0) -> list[int]:
    """`n_tokens` ids of natural text that start at a seeded place of it.

    Raises:
        ValueError: fewer than one token.
    """
    return token_rows(runner, [n_tokens], seed)[0]


def token_rows(runner: Runner, lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """One list of ids for each length, each from its own seeded place of the text."""
    if not lengths or min(lengths) < 1:
        raise ValueError(f"prompts need at least one token each, got lengths {list(lengths)}")
    rng = random.Random(seed)
    if not callable(runner.tokenizer):
        vocabulary = runner.text_config.vocab_size
        return [[rng.randrange(vocabulary) for _ in range(length)] for length in lengths]
    text = list(runner.tokenizer(heldout_text(), add_special_tokens=False, verbose=False)["input_ids"])
    return [_excerpt(text, length, rng) for length in lengths]


def prompt(runner: Runner, n_tokens: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask`, int64 [1, n_tokens], on the model's device."""
    return batch(runner, [n_tokens], seed)


def batch(runner: Runner, lengths: Sequence[int], seed: int = 0) -> dict[str, torch.Tensor]:
    """Prompts of these lengths, padded left: `input_ids` and `attention_mask`, int64 [B, longest]."""
    rows = token_rows(runner, lengths, seed)
    width, pad = max(lengths), _pad_id(runner)
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids.to(runner.model.device), "attention_mask": mask.to(runner.model.device)}


def drawing(seed: int = 0, size: int = 128, shapes: int = 3) -> Image.Image:
    """A white RGB image [size, size] with filled shapes of seeded colour, kind and place."""
    rng = random.Random(seed)
    image = Image.new("RGB", (size, size), "white")
    draw = ImageDraw.Draw(image)
    for _ in range(shapes):
        left, top = rng.randrange(size // 2), rng.randrange(size // 2)
        box = (
            left,
            top,
            left + rng.randrange(size // 4, size // 2),
            top + rng.randrange(size // 4, size // 2),
        )
        getattr(draw, rng.choice(SHAPES))(box, fill=rng.choice(COLOURS))
    return image


def image_prompt(runner: Runner, n_text_tokens: int, seed: int = 0, size: int = 128) -> dict[str, Any]:
    """A drawing followed by text, as the runner's processor encodes it; batch of one.

    Raises:
        ValueError: the runner has no image processor.
    """
    processor = runner.processor
    if getattr(processor, "image_processor", None) is None:
        raise ValueError(f"{type(runner.model).__name__} has no image processor; it takes text only")
    text = runner.tokenizer.decode(token_ids(runner, n_text_tokens, seed))
    marker = f"<|vision_start|>{processor.image_token}<|vision_end|>"
    encoded = processor(text=[marker + text], images=[drawing(seed, size)], return_tensors="pt")
    return {name: _to_model(value, runner) for name, value in encoded.items()}


def poisson_requests(
    runner: Runner, n: int, rate: float, prompt_tokens: int, max_new_tokens: int, seed: int = 0
) -> list[Request]:
    """`n` requests whose arrivals are a Poisson process of `rate` per second, the first at 0.

    Prompt and output lengths are uniform between half and the whole of what is given (at least 2 new tokens).

    Raises:
        ValueError: no request, or a rate that is not positive.
    """
    if n < 1 or rate <= 0:
        raise ValueError(f"a load needs a request and a positive rate, got {n} requests at {rate}/s")
    rng = random.Random(seed)
    lengths = [rng.randint((prompt_tokens + 1) // 2, prompt_tokens) for _ in range(n)]
    moment, requests = 0.0, []
    for index, row in enumerate(token_rows(runner, lengths, seed)):
        new_tokens = max(2, rng.randint((max_new_tokens + 1) // 2, max_new_tokens))
        requests.append(Request(f"request-{index}", tuple(row), new_tokens, moment))
        moment += rng.expovariate(rate)
    return requests


def _excerpt(text: list[int], length: int, rng: random.Random) -> list[int]:
    """A window of the text; a text shorter than the window is repeated."""
    repeated = text * (1 + length // len(text))
    start = rng.randrange(len(repeated) - length + 1)
    return repeated[start : start + length]


def _pad_id(runner: Runner) -> int:
    return runner.pad_token_id() if callable(runner.tokenizer) else 0


def _to_model(value: Any, runner: Runner) -> Any:
    """Tensors to the model's device; floating ones in its dtype too."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(runner.model.device, runner.model.dtype if value.is_floating_point() else None)
