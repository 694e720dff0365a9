"""Plans of what is measured."""

from __future__ import annotations

import dataclasses

import pytest

from pytest_inferencepio.errors import UnknownName
from pytest_inferencepio.measure.budget import PRESETS, budget_for


@pytest.mark.parametrize("scale", PRESETS)
def test_presets_have_enough_pairs_for_a_bound(scale: str) -> None:
    plan = budget_for(scale)
    assert plan.pairs >= 5
    assert plan.heldout_tokens % plan.window == 0
    assert plan.heldout_tokens >= plan.window + plan.decoded_tokens


def test_more_time_measures_more_and_less_time_less() -> None:
    plan = budget_for("tiny")
    assert budget_for("tiny", 2 * plan.seconds).pairs == 2 * plan.pairs
    small = budget_for("tiny", plan.seconds / 100)
    assert small.pairs == 5 and small.batch_pairs == 1
    for name in ("new_tokens", "heldout_tokens", "generations", "task_examples"):
        assert getattr(small, name) == getattr(plan, name)  # the workload stays comparable


def test_the_same_time_is_the_same_plan() -> None:
    plan = budget_for("full")
    assert dataclasses.asdict(plan.scaled(plan.seconds)) == dataclasses.asdict(plan)


def test_wrong_plans_are_named() -> None:
    with pytest.raises(UnknownName, match="no measuring budget for scale 'huge'; there are: tiny, full"):
        budget_for("huge")
    with pytest.raises(ValueError, match="a time budget must be positive, got 0 s"):
        budget_for("tiny", 0)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"decoded_tokens": 1}, "decoded_tokens must be at least 2, got 1"),
        ({"new_tokens": 1}, "new_tokens must be at least 2, got 1"),
        ({"generations": 0}, "generations must be at least 1, got 0"),
        ({"prompt_tokens": 3}, "prompt_tokens must be at least 4, got 3"),
        ({"heldout_tokens": 511}, "heldout_tokens must be at least 512, one window, got 511"),
    ],
)
def test_counts_that_measure_nothing_are_named(counts: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(budget_for("tiny"), **counts)  # type: ignore[arg-type]


def test_named_pairs_are_exact_unless_more_are_named_too() -> None:
    preset = budget_for("tiny")
    named = preset.changed({"pairs": 30})
    assert (named.pairs, named.most_pairs, named.suspect_pairs) == (30, 30, 30)
    assert preset.changed({"pairs": 5, "most_pairs": 8}).most_pairs == 8
    assert preset.changed({"pairs": 5, "suspect_pairs": 9}).suspect_pairs == 9
    assert preset.changed({"new_tokens": 4}).most_pairs == preset.most_pairs
