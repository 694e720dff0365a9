"""Edges of the input space, and that NaNs there are counted and named."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from optimizations.runner import Runner
from pytest_inferencepio.measure import stability
from pytest_inferencepio.measure.budget import budget_for

SMALL = dataclasses.replace(budget_for("tiny"), window=24, longest_tokens=100)


def test_inputs_are_the_edges(runner: Runner) -> None:
    inputs = dict(stability.extreme_inputs(runner, SMALL))
    assert inputs["one token"]["input_ids"].shape == (1, 1)
    assert len(inputs["one token repeated"]["input_ids"].unique()) == 1
    assert inputs["longest prompt"]["input_ids"].shape == (1, 100)
    assert inputs["padding"]["attention_mask"].sum(1).tolist() == [1, 24]


def test_the_longest_prompt_fits_the_model(runner: Runner) -> None:
    limited = Runner(copy.deepcopy(runner.model), runner.processor)
    limited.model.config.max_position_embeddings = 40
    assert dict(stability.extreme_inputs(limited, SMALL))["longest prompt"]["input_ids"].shape == (1, 40)


def test_a_sound_model_has_none(runner: Runner) -> None:
    found, notes = stability.nonfinite_outputs(runner, SMALL)
    vocabulary = runner.text_config.vocab_size
    assert found.value == 0 and notes == []
    assert found.n == vocabulary * (1 + 24 + 64 + 25)  # real tokens among the last 64 of each input


def test_an_overflow_is_counted_and_its_input_named(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """A norm that overflows only on long inputs."""
    norm = runner.model.model.norm
    forward = norm.forward

    def overflow(hidden: torch.Tensor) -> torch.Tensor:
        return forward(hidden) * (float("inf") if hidden.shape[1] == 100 else 1.0)

    monkeypatch.setattr(norm, "forward", overflow)
    found, notes = stability.nonfinite_outputs(runner, SMALL)
    assert found.value == 64 * runner.text_config.vocab_size
    assert notes == [f"{int(found.value)} NaN or infinite logits for longest prompt"]
