"""Before and after in one run: speed, memory, accuracy, what optimizing cost and when it has paid back."""

from __future__ import annotations

from pytest_inferencepio.measurement import Measurement


def test_optimization_impact(pio_measure: Measurement) -> None:
    from pytest_inferencepio.measure import latency
    from pytest_inferencepio.record import metric, not_measured
    from pytest_inferencepio.suite.shared import (
        fidelity_metrics,
        memory_metrics,
        task_metrics,
        weight_metrics,
    )

    row = pio_measure.row
    metrics = memory_metrics(pio_measure) | weight_metrics(pio_measure)
    metrics |= fidelity_metrics(pio_measure) | task_metrics(pio_measure)[0]
    paired = pio_measure.generations()
    metrics |= latency.speed_metrics(paired)
    notes = ["the unoptimized model against a second copy of itself: the noise of this machine"]
    if row.parts:
        seconds = pio_measure.pair.conversion_time
        metrics["conversion_time"] = metric("conversion_time", seconds)
        if paired.before:
            metrics["break_even_tokens"] = latency.break_even_tokens(seconds, paired.before, paired.after)
        else:
            metrics["break_even_tokens"] = not_measured("break_even_tokens", pio_measure.pair.why_no_before)
        judged = (metrics.get(name) for name in ("speedup", "memory_ratio", "perplexity_ratio"))
        notes = [pio_measure.targets.judged(*judged)]
    pio_measure.conclude(metrics, pio_measure.generation_workload(), notes)
