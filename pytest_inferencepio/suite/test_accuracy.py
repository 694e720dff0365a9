"""Same answers? Logits, generations, perplexity, tasks, stability, gradients against the unoptimized model."""

from __future__ import annotations

from pytest_inferencepio.measurement import Measurement


def test_accuracy(pio_measure: Measurement) -> None:
    from pytest_inferencepio.measure import fidelity, stability
    from pytest_inferencepio.record import not_measured
    from pytest_inferencepio.suite.shared import fidelity_metrics, task_metrics

    budget, before = pio_measure.budget, pio_measure.before
    metrics = pio_measure.benchmark.pedantic(lambda: fidelity_metrics(pio_measure))
    metrics["nonfinite_outputs"], notes = stability.nonfinite_outputs(
        pio_measure.after, budget, pio_measure.seed
    )
    tasks, task_notes = task_metrics(pio_measure)
    metrics |= tasks
    if before is None:
        metrics["gradient_error"] = not_measured("gradient_error", pio_measure.pair.why_no_before)
    else:
        window = fidelity.heldout(before, budget)[0]
        metrics["gradient_error"] = fidelity.gradient_error(before, pio_measure.after, window)
    pio_measure.conclude(
        metrics,
        {
            "heldout_tokens": budget.heldout_tokens,
            "window": budget.window,
            "generations": budget.generations,
            "generation_tokens": budget.generation_tokens,
            "decoded_tokens": budget.decoded_tokens,
            "task_examples": budget.task_examples,
            "task_distance": budget.task_distance,
        },
        [*notes, *task_notes],
    )
