"""Quick figures during training: teacher-forced exact match and held-out perplexity, in float32 on the CPU."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from pytest_inferencepio.tasks.drawing import IMAGE_TASKS
from pytest_inferencepio.tasks.examples import Arithmetic, Copy, Example, Retrieval
from pytest_inferencepio.tasks.text import heldout_tokens
from training.save import image_processor

TASKS = (Retrieval((256,)), Retrieval((1024,)), Copy(), Arithmetic())


def image_inputs(model: nn.Module, ids: Tensor, example: Example) -> dict[str, Tensor]:
    """What the vision tower needs for an example with an image, nothing for text."""
    if example.image is None:
        return {}
    pixels = dict(image_processor()(images=[example.image], return_tensors="pt"))
    return {**pixels, "mm_token_type_ids": (ids == model.config.image_token_id).int()}


def correct(model: nn.Module, example: Example) -> bool:
    """Whether every answer token is the likeliest one after the prompt and the answer before it."""
    ids = torch.tensor([example.prompt_ids + example.answer_ids])
    logits = model(input_ids=ids, **image_inputs(model, ids, example)).logits[
        0, len(example.prompt_ids) - 1 : -1
    ]
    return bool((logits.argmax(-1) == ids[0, len(example.prompt_ids) :]).all())


def perplexity(model: nn.Module, tokenizer: Any, windows: int = 12, length: int = 1024) -> float:
    """Perplexity of the shipped excerpt in windows of 1,024 tokens without overlap."""
    ids = torch.tensor(heldout_tokens(tokenizer, windows * length)).view(windows, length)
    total = 0.0
    for window in ids:
        logits = model(input_ids=window[None]).logits[0, :-1].float()
        total += nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
    return math.exp(total / (windows * (length - 1)))


@torch.no_grad()
def validate(model: nn.Module, tokenizer: Any, n: int = 32) -> dict[str, float]:
    """Exact match of each task on `n` examples (retrieval n // 2 per distance) and perplexity."""
    training_attention = model.config._attn_implementation
    model.eval()
    model.set_attn_implementation("sdpa")
    figures = {}
    seen = IMAGE_TASKS if hasattr(model.config, "vision_config") else ()
    for task in (*TASKS, *seen):
        examples = task.examples(tokenizer, n, seed=1)
        label = task.name + (str(task.distances[0]) if isinstance(task, Retrieval) else "")
        figures[label] = sum(correct(model, example) for example in examples) / n
    figures["perplexity"] = round(perplexity(model, tokenizer), 3)
    model.train()
    model.set_attn_implementation(training_attention)
    return figures
