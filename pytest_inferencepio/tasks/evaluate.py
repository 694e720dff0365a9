"""Exact-match scoring of any `generate`, batched over prompts of equal length, greedy."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pytest_inferencepio.tasks.drawing import IMAGE_TASKS
from pytest_inferencepio.tasks.examples import TEXT_TASKS, Example, Task

Generate = Callable[..., Tensor]


@dataclass(frozen=True)
class TaskScore:
    """Outcome per example, in the examples' order (paired tests need it), and the distance of each."""

    task: str
    outcomes: tuple[bool, ...]
    distances: tuple[int | None, ...]

    @property
    def correct(self) -> int:
        """How many answers were right in every token."""
        return sum(self.outcomes)

    @property
    def exact_match(self) -> float:
        """Share of right answers, 0 to 1."""
        return self.correct / len(self.outcomes)

    def by_distance(self) -> dict[int, tuple[int, int]]:
        """Distance in tokens → (right, asked); empty for tasks without distances."""
        counts: dict[int, list[bool]] = defaultdict(list)
        for outcome, distance in zip(self.outcomes, self.distances, strict=True):
            if distance is not None:
                counts[distance].append(outcome)
        return {distance: (sum(found), len(found)) for distance, found in sorted(counts.items())}


def tasks_for(config: Any) -> tuple[Task, ...]:
    """The text tasks, and those on drawings for a model with a vision tower."""
    return (*TEXT_TASKS, *IMAGE_TASKS) if hasattr(config, "vision_config") else TEXT_TASKS


def batches(examples: Sequence[Example], size: int) -> Iterator[list[int]]:
    """Indices of examples with equal prompt lengths, at most `size` together: no padding anywhere."""
    groups: dict[int, list[int]] = defaultdict(list)
    for index, example in enumerate(examples):
        groups[len(example.prompt_ids)].append(index)
    for indices in groups.values():
        for start in range(0, len(indices), size):
            yield indices[start : start + size]


def model_inputs(
    examples: Sequence[Example],
    image_processor: Callable[..., Any] | None = None,
    image_token_id: int | None = None,
) -> dict[str, Tensor]:
    """input_ids and attention_mask (batch, tokens) int64; pixels, grids and token types for images.

    Raises ValueError for an image without an image processor, and for prompts of different lengths.
    """
    ids = torch.tensor([example.prompt_ids for example in examples])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    images = [example.image for example in examples if example.image is not None]
    if not images:
        return inputs
    if image_processor is None or image_token_id is None:
        raise ValueError(
            f"Task {examples[0].task!r} shows images, but no image processor was given; pass the model's processor's "
            "image_processor and config.image_token_id, or choose text tasks."
        )
    pixels = image_processor(images=images, return_tensors="pt")
    types = (ids == image_token_id).int()
    return {
        **inputs,
        **{name: pixels[name] for name in ("pixel_values", "image_grid_thw")},
        "mm_token_type_ids": types,
    }


@torch.no_grad()
def score(
    generate: Generate,
    examples: Sequence[Example],
    batch_size: int = 16,
    image_processor: Callable[..., Any] | None = None,
    image_token_id: int | None = None,
    device: str | torch.device = "cpu",
) -> TaskScore:
    """Generates each answer greedily and compares every token; `generate` is called like `model.generate`."""
    outcomes = [False] * len(examples)
    for indices in batches(examples, batch_size):
        chosen = [examples[index] for index in indices]
        inputs = model_inputs(chosen, image_processor, image_token_id)
        longest = max(len(example.answer_ids) for example in chosen)
        out = generate(
            **{name: value.to(device) for name, value in inputs.items()},
            max_new_tokens=longest,
            do_sample=False,
        )
        answers = out[:, inputs["input_ids"].shape[1] :].tolist()
        for index, example, answer in zip(indices, chosen, answers, strict=True):
            outcomes[index] = tuple(answer[: len(example.answer_ids)]) == example.answer_ids
    return TaskScore(examples[0].task, tuple(outcomes), tuple(example.distance for example in examples))


def evaluate_exact(
    generate: Generate, tokenizer: Any, tasks: Sequence[Task], n: int = 64, seed: int = 0, **options: Any
) -> dict[str, TaskScore]:
    """Scores `n` examples of each task; `options` are those of `score`. Task name → TaskScore."""
    return {task.name: score(generate, task.examples(tokenizer, n, seed), **options) for task in tasks}
