"""On the reference checkpoint and its questions about drawings: pruning against shrinking, tokens being equal."""

from __future__ import annotations

import torch

from optimizations.vision.equal_tokens import Inputs, compare_at_equal_tokens
from optimizations.vision.visual_token_pruning import VisualTokenPruning
from pytest_inferencepio.catalog.entries import lookup
from pytest_inferencepio.catalog.loading import load
from pytest_inferencepio.tasks.drawing import IMAGE_TASKS
from pytest_inferencepio.tasks.evaluate import model_inputs


def test_pruning_keeps_the_answers_that_a_smaller_image_loses() -> None:
    runner = load(lookup("qwen3_vl_2b"), "tiny").runner
    config, processor = runner.model.config, runner.processor.image_processor
    examples: list[tuple[Inputs, tuple[int, ...]]] = []
    for task in IMAGE_TASKS:
        for example in task.examples(runner.tokenizer, 12, seed=11):
            inputs = model_inputs([example], processor, config.image_token_id)
            inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
            examples.append((inputs, example.answer_ids))
    technique = VisualTokenPruning()
    found = compare_at_equal_tokens(runner, examples, technique, rounds=1)
    assert found.visual_tokens["pruned"] == found.visual_tokens["smaller_image"]
    assert found.visual_tokens["pruned"] <= technique.keep_ratio * found.visual_tokens["full"]
    assert found.exact_match["pruned"] >= found.exact_match["full"] - technique.budget.max_task_drop
    assert found.exact_match["pruned"] > found.exact_match["smaller_image"]
