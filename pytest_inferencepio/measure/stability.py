"""Numerical stability: what a model answers to inputs at the edges, counted in NaNs and infinities."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from pytest_inferencepio import workloads
from pytest_inferencepio.record import Metric, metric

if TYPE_CHECKING:
    from optimizations.runner import Runner
    from pytest_inferencepio.measure.budget import Budget

LOGITS_KEPT = 64


def extreme_inputs(
    runner: Runner, budget: Budget, seed: int = 0
) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Named inputs: one token, one token repeated, the longest prompt, rows of 1 and `window` tokens padded left."""
    device = runner.model.device
    (token,) = workloads.token_ids(runner, 1, seed)
    longest = min(budget.longest_tokens, runner.text_config.max_position_embeddings)
    yield "one token", workloads.prompt(runner, 1, seed)
    repeated = torch.full((1, budget.window), token, device=device)
    yield "one token repeated", {"input_ids": repeated, "attention_mask": torch.ones_like(repeated)}
    yield "longest prompt", workloads.prompt(runner, longest, seed)
    yield "padding", workloads.batch(runner, [1, budget.window], seed)


def nonfinite_outputs(runner: Runner, budget: Budget, seed: int = 0) -> tuple[Metric, list[str]]:
    """`nonfinite_outputs`: NaNs and infinities among the last logits of real tokens, and where they were."""
    total, count, notes = 0, 0, []
    for name, inputs in extreme_inputs(runner, budget, seed):
        logits = runner.forward(**inputs, logits_to_keep=LOGITS_KEPT).logits
        real = inputs["attention_mask"][:, -logits.shape[1] :].bool()
        bad = int((~torch.isfinite(logits[real])).sum())
        total, count = total + bad, count + logits[real].numel()
        if bad:
            notes.append(f"{bad} NaN or infinite logits for {name}")
    return metric("nonfinite_outputs", total, n=count), notes
