"""Joules per token by a hardware counter, or the reason why there is none here; never an estimate."""

from __future__ import annotations

from pytest_inferencepio.measurement import Measurement


def test_power_efficiency(pio_measure: Measurement) -> None:
    from pytest_inferencepio.errors import NotMeasurable
    from pytest_inferencepio.measure import energy, latency
    from pytest_inferencepio.record import metric, not_measured

    budget = pio_measure.budget
    workload = {"prompt_tokens": budget.prompt_tokens, "new_tokens": budget.new_tokens, "batch": 1}
    try:
        meter = energy.open_meter(pio_measure.device)
    except NotMeasurable as reason:
        missing = {"energy_per_token": not_measured("energy_per_token", str(reason))}
        pio_measure.not_measurable(missing, workload, str(reason))
        return
    inputs = pio_measure.inputs(budget.prompt_tokens)

    def generate() -> int:
        pio_measure.after.timed_generate(budget.new_tokens, **inputs)
        return budget.new_tokens

    sample = pio_measure.benchmark.pedantic(
        lambda: energy.measure(meter, generate, budget.energy_seconds), warmup_rounds=1
    )
    metrics = {"energy_per_token": metric("energy_per_token", sample.per_token)}
    metrics |= latency.latency_metrics([latency.generate_once(pio_measure.after, inputs, budget.new_tokens)])
    pio_measure.conclude(metrics, workload, [f"{meter.source} counts {meter.scope}"])
