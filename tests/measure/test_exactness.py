"""Exact tasks: paired outcomes, distances within the plan, tokenizers that cannot be asked."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from optimizations.runner import Runner
from pytest_inferencepio.errors import NotMeasurable
from pytest_inferencepio.measure import exactness
from pytest_inferencepio.measure.budget import budget_for
from pytest_inferencepio.tasks.evaluate import TaskScore

SMALL = dataclasses.replace(budget_for("tiny"), task_examples=2, task_distance=64)


def score(task: str, outcomes: str, distances: tuple[int | None, ...] = ()) -> TaskScore:
    return TaskScore(task, tuple(o == "+" for o in outcomes), distances or (None,) * len(outcomes))


def test_the_drop_is_net_and_the_note_says_what_was_lost_and_gained() -> None:
    before = {"copy": score("copy", "++++-"), "sum": score("sum", "++--+")}
    after = {"copy": score("copy", "+--+-"), "sum": score("sum", "++-++")}
    metrics, notes = exactness.task_metrics(before, after)
    assert metrics["task_exact_match"].value == 6 / 10
    assert metrics["task_drop"].value == pytest.approx(1 / 10) and metrics["task_drop"].n == 10
    assert notes[0] == "exact answers: copy 2/5, sum 4/5"
    assert notes[1] == "2 exact answers lost and 1 gained (one-sided McNemar p = 0.5)"


def test_equal_outcomes_have_no_second_note() -> None:
    same = {"retrieval": score("retrieval", "+-", (64, 256))}
    metrics, notes = exactness.task_metrics(same, same)
    assert metrics["task_drop"].value == 0
    assert notes == ["exact answers: retrieval 1/2 (1/1 at 64, 0/1 at 256)"]


def test_without_a_reference_there_is_no_drop() -> None:
    metrics, _ = exactness.task_metrics(None, {"copy": score("copy", "+")})
    assert metrics.keys() == {"task_exact_match"}


def test_a_tokenizer_without_symbols_cannot_be_asked(runner: Runner) -> None:
    stranger = SimpleNamespace(
        tokenizer=SimpleNamespace(convert_tokens_to_ids=lambda t: [None for _ in t], unk_token_id=None)
    )
    with pytest.raises(
        NotMeasurable, match="tasks with exact answers cannot be asked: .*lacks the task symbols"
    ):
        exactness.task_scores(stranger, SMALL)  # type: ignore[arg-type]
    reasons = exactness.without_tasks("why")
    assert {value.reason for value in reasons.values()} == {"why"}


def test_a_real_model_is_asked_every_text_task_within_the_distance(runner: Runner) -> None:
    scores = exactness.task_scores(runner, SMALL)
    assert set(scores) == {"retrieval", "copy", "arithmetic"}
    assert set(scores["retrieval"].distances) == {64}
    assert all(len(found.outcomes) == 2 for found in scores.values())


def test_an_oracle_gets_everything_right(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers known to the generator: the scoring must find them in what `generate` returns."""
    from pytest_inferencepio.tasks.examples import TEXT_TASKS

    asked = [
        example
        for task in TEXT_TASKS
        for example in exactness._within(task, 64).examples(runner.tokenizer, 2, 0)
    ]
    known = {example.prompt_ids: example.answer_ids for example in asked}

    def oracle(self: Runner, input_ids: torch.Tensor, **_: object) -> torch.Tensor:
        rows = [list(row) + list(known[tuple(row)]) for row in input_ids.tolist()]
        return torch.tensor(rows)

    monkeypatch.setattr(Runner, "generate", oracle)
    metrics, _ = exactness.task_metrics(None, exactness.task_scores(runner, SMALL))
    assert metrics["task_exact_match"].value == 1.0
