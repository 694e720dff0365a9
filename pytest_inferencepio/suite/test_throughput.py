"""Tokens per second over batch sizes, requests per second and goodput under Poisson arrivals."""

from __future__ import annotations

import dataclasses

from pytest_inferencepio.measurement import Measurement


def test_throughput(pio_measure: Measurement) -> None:
    from pytest_inferencepio import workloads
    from pytest_inferencepio.machine import require_possible
    from pytest_inferencepio.measure import memory, serving

    budget, before, after = pio_measure.budget, pio_measure.before, pio_measure.after
    *smaller, largest = budget.batch_sizes
    curve = serving.batch_curve(
        before, after, dataclasses.replace(budget, batch_sizes=tuple(smaller)), pio_measure.seed
    )
    prompts = workloads.token_rows(after, [budget.prompt_tokens] * largest, pio_measure.seed)
    curve[largest] = pio_measure.interleave(
        lambda runner: serving.run_batch(runner, prompts, budget.request_new_tokens),
        pairs=budget.batch_pairs,
        warmup=1,
    )
    metrics = serving.batch_metrics(curve)
    notes: tuple[str, ...] = ()
    if before is None:
        metrics |= serving.metrics_without_reference(after, budget, pio_measure.seed)
    else:
        # For every row anew: the machine of another row's minute may have been twice as fast.
        load = serving.reference_load(before, budget, pio_measure.seed)
        metrics |= serving.arrival_metrics(after, load.requests, load.objective)
        notes = load.notes
    work = memory.work_of(before or after, after, largest * budget.request_new_tokens)
    require_possible(metrics, work, pio_measure.device)
    pio_measure.conclude(
        metrics,
        {
            "prompt_tokens": budget.prompt_tokens,
            "new_tokens": budget.request_new_tokens,
            "batch_sizes": list(budget.batch_sizes),
            "requests": budget.requests,
        },
        [*serving.curve_notes(curve), *notes],
    )
