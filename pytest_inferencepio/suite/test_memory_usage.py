"""Peak of fresh processes, weights held, cache bytes per token, read bandwidth that decoding achieves."""

from __future__ import annotations

from pytest_inferencepio.measurement import Measurement


def test_memory_usage(pio_measure: Measurement) -> None:
    from pytest_inferencepio.machine import require_possible
    from pytest_inferencepio.measure import latency, memory
    from pytest_inferencepio.suite.shared import memory_metrics, weight_metrics

    budget = pio_measure.budget
    metrics = memory_metrics(pio_measure)  # first: at full scale it needs the room that the models take
    metrics |= weight_metrics(pio_measure)
    metrics["kv_bytes_per_token"] = memory.kv_bytes_per_token(pio_measure.after, seed=pio_measure.seed)
    inputs = pio_measure.inputs(budget.prompt_tokens)
    paired = pio_measure.interleave(
        lambda runner: latency.generate_once(runner, inputs, budget.new_tokens),
        pairs=max(3, budget.pairs // 4),
        warmup=1,
        with_reference=False,
    )
    metrics |= memory.bandwidth_metrics(pio_measure.after, paired.after)
    work = memory.work_of(pio_measure.before or pio_measure.after, pio_measure.after)
    require_possible(metrics, work, pio_measure.device)
    pio_measure.conclude(
        metrics, {"prompt_tokens": budget.prompt_tokens, "new_tokens": budget.new_tokens, "batch": 1}
    )
