"""Time to first token, time per output token, prefill and decode rates: median and worst case, paired."""

from __future__ import annotations

from pytest_inferencepio.measurement import Measurement


def test_inference_speed(pio_measure: Measurement) -> None:
    from pytest_inferencepio.machine import require_possible
    from pytest_inferencepio.measure import latency, memory
    from pytest_inferencepio.measure.metrics import technique_metrics
    from pytest_inferencepio.suite.shared import steps_metric

    paired = pio_measure.generations()
    metrics = latency.speed_metrics(paired)
    metrics["accepted_tokens_per_step"] = steps_metric(paired.after)
    counted, remarks = technique_metrics(pio_measure.after)
    metrics |= counted
    work = memory.work_of(
        pio_measure.before or pio_measure.after,
        pio_measure.after,
        metrics["accepted_tokens_per_step"].high or 1.0,
    )
    require_possible(metrics, work, pio_measure.device)
    pio_measure.conclude(metrics, pio_measure.generation_workload(), remarks)
