"""What this machine can do, the least time it allows this model, and how near prefill and decode come."""

from __future__ import annotations

from pytest_inferencepio.measurement import Measurement

MEASURED = (
    "time_to_first_token",
    "time_per_output_token",
    "prefill_tokens_per_second",
    "decode_tokens_per_second",
)


def test_hardware(pio_measure: Measurement) -> None:
    import dataclasses

    from pytest_inferencepio import machine, workloads
    from pytest_inferencepio.measure import latency, memory, roofline
    from pytest_inferencepio.suite.shared import steps_metric

    budget, after = pio_measure.budget, pio_measure.after
    inputs = workloads.prompt(
        after, budget.prompt_tokens, pio_measure.seed
    )  # text: the roofline is the decoder's
    paired = pio_measure.interleave(
        lambda runner: latency.generate_once(runner, inputs, budget.new_tokens),
        warmup=budget.warmup,
        with_reference=False,
        beside=lambda: machine.reread(pio_measure.device),
    )
    found = latency.latency_metrics(paired.after)
    metrics = {name: found[name] for name in MEASURED}
    work = dataclasses.replace(
        memory.work_of(pio_measure.before or after, after, steps_metric(paired.after).high or 1.0),
        prompt_tokens=budget.prompt_tokens,
    )
    machine.require_possible(metrics, work, pio_measure.device)
    fingerprint = machine.fingerprint(pio_measure.device)  # with the ceilings that were measured again
    metrics |= roofline.machine_metrics(fingerprint)
    metrics |= roofline.roofline_metrics(paired.after, work, fingerprint)
    pio_measure.conclude(
        metrics,
        {"prompt_tokens": budget.prompt_tokens, "new_tokens": budget.new_tokens, "batch": 1},
        roofline.notes(work, fingerprint),
    )
