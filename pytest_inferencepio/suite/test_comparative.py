"""The row against other engines and kernels on the same dimensions, in one run, by the same clock."""

from __future__ import annotations

from pytest_inferencepio.measurement import Measurement


def test_comparative(pio_measure: Measurement) -> None:
    from pytest_inferencepio import workloads
    from pytest_inferencepio.measure import against_peers

    budget, chosen = pio_measure.budget, pio_measure.peers
    workload = {"prompt_tokens": budget.prompt_tokens, "new_tokens": budget.new_tokens, "batch": 1}
    refused = against_peers.refusals(pio_measure, chosen)
    if len(refused) == len(chosen):
        missing = against_peers.metrics(refused, pio_measure.device)
        pio_measure.not_measurable(missing, workload, "; ".join(against_peers.notes(refused)), loaded=False)
        return
    pio_measure.make_room()
    prompt = workloads.token_ids(pio_measure.after, budget.prompt_tokens, pio_measure.seed)
    comparison = against_peers.Comparison(pio_measure, prompt)
    for name, peer in chosen.items():
        if name in refused:
            comparison.outcomes[name] = refused[name]
        else:
            comparison.against(peer)
    metrics = against_peers.metrics(comparison.outcomes, pio_measure.device)
    if not comparison.measured:
        pio_measure.not_measurable(metrics, workload, "; ".join(against_peers.notes(comparison.outcomes)))
        return
    pio_measure.conclude(metrics, workload, against_peers.notes(comparison.measured))
