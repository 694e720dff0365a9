"""What more than one category measures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pytest

from pytest_inferencepio.errors import NotMeasurable
from pytest_inferencepio.measure import exactness, fidelity, latency, memory, transport
from pytest_inferencepio.record import Metric, metric, not_measured

if TYPE_CHECKING:
    from pytest_inferencepio.measurement import Measurement


RANDOM = "random weights: there is nothing they could know; name a checkpoint with --pio-checkpoint"


def steps_metric(generations: Sequence[latency.Generation]) -> Metric:
    """`accepted_tokens_per_step` after the first token: tokens of one speculative step share their moment.

    Over all generations together, and the range of the single ones: most short ones have no draft accepted, so their
    median would say 1 of a technique that gains a tenth.
    """
    counts = [(len(g.gaps), max(1, sum(gap > 0 for gap in g.gaps))) for g in generations]
    rates = [tokens / steps for tokens, steps in counts]
    total = sum(tokens for tokens, _ in counts) / sum(steps for _, steps in counts)
    return metric("accepted_tokens_per_step", total, min(rates), max(rates), len(rates))


def memory_metrics(measure: Measurement) -> dict[str, Metric]:
    """Peaks of fresh processes with and without the optimizations, and their ratios."""
    row, budget = measure.row, measure.budget
    if not row.model.in_catalog:
        return _no_peaks(
            f"{row.model.name} is not of the catalog, so that a fresh process cannot load it by name"
        )
    try:
        foreign = transport.foreign_techniques(row.parts)
    except NotMeasurable as error:
        return _no_peaks(str(error))
    arguments = {
        "model": row.model.name,
        "scale": row.scale,
        "prompt_tokens": budget.prompt_tokens,
        "new_tokens": budget.new_tokens,
        "device": measure.device,
        "dtype": measure.dtype,
        "checkpoint": measure.checkpoint,
        "seed": measure.seed,
        "image_size": budget.image_size if row.model.entry.multimodal else 0,
        "foreign": foreign,
    }
    if row.scale == "tiny" and any(part.compiles for part in row.parts):
        # Its code is on disk from now on. A process that finds none peaks 28 to 43 MB higher, which of a tiny model is
        # a quarter and of a full one nothing.
        _ = measure.pair
    if reason := measure.no_room(optimized=True):
        pytest.fail(f"{row.id}: {reason}", pytrace=False)
    after = measure.once("peak", lambda: _peaks(measure, arguments, row.spec))
    if reason := measure.no_room(optimized=False):
        missing = {name: not_measured(name, reason) for name in ("memory_ratio", "model_memory_ratio")}
        return {**after, **missing}
    before = measure.once("reference peak", lambda: _peaks(measure, arguments, "none"), of_reference=True)
    return {**after, **memory.memory_ratios(before, after)}


def _no_peaks(reason: str) -> dict[str, Metric]:
    names = ("peak_memory", "model_peak_memory", "process_memory", "memory_ratio", "model_memory_ratio")
    return {name: not_measured(name, reason) for name in names}


def _peaks(measure: Measurement, arguments: dict[str, object], spec: str) -> dict[str, Metric]:
    arguments = {**arguments, "optimization": spec}
    return memory.peak_metrics(measure.processes, arguments, measure.budget.processes)


def weight_metrics(measure: Measurement) -> dict[str, Metric]:
    """Bytes that both models hold, and their ratio."""
    after = metric("weight_memory", memory.weight_memory(measure.after.model))
    found = {"weight_memory": after}
    if measure.before is not None:
        before = memory.weight_memory(measure.before.model)
        found["weight_memory_ratio"] = metric(
            "weight_memory_ratio", memory.weight_memory(measure.after.model) / before
        )
    else:
        found["weight_memory_ratio"] = not_measured("weight_memory_ratio", measure.pair.why_no_before)
    return found


def fidelity_metrics(measure: Measurement) -> dict[str, Metric]:
    """Similarity and perplexity against the unoptimized model, measured once per row.

    Of random weights the similarity alone: it shows what a technique does to numbers, not to answers.
    """
    metrics = measure.once("fidelity", lambda: _fidelity(measure))
    if measure.pair.source != "random":
        return metrics
    return metrics | {name: not_measured(name, RANDOM) for name in ("perplexity", "perplexity_ratio")}


def _fidelity(measure: Measurement) -> dict[str, Metric]:
    budget, before = measure.budget, measure.before
    after = fidelity.answers(measure.after, budget, measure.seed)
    if before is None:
        names = ("kl_divergence", "logit_error", "top1_agreement", "generation_match", "perplexity_ratio")
        missing = {name: not_measured(name, measure.pair.why_no_before) for name in names}
        return {**fidelity.perplexity_metrics(None, after), **missing}
    reference = measure.once(
        "answers", lambda: fidelity.answers(before, budget, measure.seed), of_reference=True
    )
    return {
        **fidelity.similarity_metrics(reference, after),
        **fidelity.perplexity_metrics(reference, after),
    }


def task_metrics(measure: Measurement) -> tuple[dict[str, Metric], list[str]]:
    """Tasks with exact answers against the unoptimized model, measured once per row, and notes about them."""
    if measure.pair.source == "random":
        return exactness.without_tasks(RANDOM), []
    return measure.once("tasks", lambda: _tasks(measure))


def _tasks(measure: Measurement) -> tuple[dict[str, Metric], list[str]]:
    budget, before = measure.budget, measure.before
    try:
        after = exactness.task_scores(measure.after, budget, measure.seed)
    except NotMeasurable as error:
        return exactness.without_tasks(str(error)), []
    if before is None:
        return exactness.task_metrics(None, after)
    reference = measure.once(
        "task answers", lambda: exactness.task_scores(before, budget, measure.seed), of_reference=True
    )
    return exactness.task_metrics(reference, after)
