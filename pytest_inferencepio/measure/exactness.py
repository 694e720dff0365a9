"""Tasks with exact answers: how many a runner gets right, and which it lost against the unoptimized model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

from optimizations.repeatable import repeatable
from pytest_inferencepio import stats
from pytest_inferencepio.errors import NotMeasurable
from pytest_inferencepio.measure.metrics import from_estimate
from pytest_inferencepio.record import Metric, metric, not_measured
from pytest_inferencepio.tasks.evaluate import TaskScore, evaluate_exact, tasks_for
from pytest_inferencepio.tasks.examples import Retrieval, Task, symbol_ids

if TYPE_CHECKING:
    from optimizations.runner import Runner
    from pytest_inferencepio.measure.budget import Budget

Scores = Mapping[str, TaskScore]


@repeatable()
def task_scores(runner: Runner, budget: Budget, seed: int = 0) -> Scores:
    """Score `budget.task_examples` examples of every task this model can be asked, through its `generate`.

    Raises:
        NotMeasurable: the runner's tokenizer does not know the tasks' symbols.
    """
    try:
        symbol_ids(runner.tokenizer)
    except (AttributeError, ValueError) as error:
        raise NotMeasurable(f"tasks with exact answers cannot be asked: {error}") from error
    config = runner.model.config
    return evaluate_exact(
        runner.generate,
        runner.tokenizer,
        [_within(task, budget.task_distance) for task in tasks_for(config)],
        budget.task_examples,
        seed,
        image_processor=getattr(runner.processor, "image_processor", None),
        image_token_id=getattr(config, "image_token_id", None),
        device=runner.model.device,
    )


def task_metrics(reference: Scores | None, after: Scores) -> tuple[dict[str, Metric], list[str]]:
    """`task_exact_match` over all examples, `task_drop` against the reference on the same examples; notes.

    `task_drop` may be negative, where chance or the technique gained examples. Its note has McNemar's p.
    """
    right = [outcome for score in after.values() for outcome in score.outcomes]
    found = {"task_exact_match": from_estimate("task_exact_match", stats.wilson(sum(right), len(right)))}
    notes = ["exact answers: " + ", ".join(_line(score) for score in after.values())]
    if reference is None:
        return found, notes
    before = [outcome for name in after for outcome in reference[name].outcomes]
    lost = sum(b and not a for b, a in zip(before, right, strict=True))
    gained = sum(a and not b for b, a in zip(before, right, strict=True))
    found["task_drop"] = metric("task_drop", (lost - gained) / len(right), n=len(right))
    if lost or gained:
        p = stats.mcnemar(lost, gained)
        notes.append(f"{lost} exact answers lost and {gained} gained (one-sided McNemar p = {p:.3g})")
    return found, notes


def without_tasks(reason: str) -> dict[str, Metric]:
    """Both metrics as not measured."""
    return {name: not_measured(name, reason) for name in ("task_exact_match", "task_drop")}


def _within(task: Task, distance: int) -> Task:
    """Retrieval over at most `distance` tokens; other tasks as they are."""
    if not isinstance(task, Retrieval):
        return task
    near = tuple(d for d in task.distances if d <= distance)
    return dataclasses.replace(task, distances=near or task.distances[:1])


def _line(score: TaskScore) -> str:
    distances = [f"{right}/{asked} at {d}" for d, (right, asked) in score.by_distance().items()]
    detail = f" ({', '.join(distances)})" if len(distances) > 1 else ""
    return f"{score.task} {score.correct}/{len(score.outcomes)}{detail}"
