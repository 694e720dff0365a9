"""Batches and arrival loads: what counts, what is refused, and real completions."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest

from optimizations.runner import Runner
from optimizations.serving import Completion, Request
from pytest_inferencepio import workloads
from pytest_inferencepio.errors import MeasurementFailed
from pytest_inferencepio.measure import serving
from pytest_inferencepio.measure.budget import budget_for
from pytest_inferencepio.measure.serving import Batch, Objective
from pytest_inferencepio.measure.timing import Paired

SMALL = dataclasses.replace(
    budget_for("tiny"), prompt_tokens=8, request_new_tokens=3, requests=4, batch_sizes=(1, 2), batch_pairs=2
)


class Recorded:
    """A server that answers from a list."""

    def __init__(self, completions: Sequence[Completion]) -> None:
        self.completions = list(completions)

    def serve(self, requests: Sequence[Request]) -> list[Completion]:
        return self.completions


def done(name: str, arrival: float, *times: float) -> Completion:
    request = Request(name, (1, 2), len(times), arrival)
    return Completion(request, tuple(range(len(times))), times)


@pytest.mark.parametrize(
    ("times", "met"),
    [((1.2, 1.3, 1.4), True), ((1.6, 1.7, 1.8), False), ((1.2, 1.5, 1.8), False), ((1.5, 1.6, 1.7), True)],
)
def test_an_objective_needs_both_latencies(times: tuple[float, ...], met: bool) -> None:
    assert Objective(0.5, 0.11).met_by(done("a", 1.0, *times)) is met


def test_goodput_counts_the_requests_that_met_the_objective(runner: Runner) -> None:
    completions = [done("a", 0.0, 0.1, 0.2), done("b", 0.5, 1.9, 2.0), done("c", 1.0, 1.1, 1.2)]
    runner.server = Recorded(completions)
    metrics = serving.arrival_metrics(runner, [c.request for c in completions], Objective(0.5, 0.2))
    assert metrics["requests_per_second"].value == pytest.approx(3 / 2.0)
    assert metrics["goodput"].value == pytest.approx(2 / 2.0)
    assert metrics["goodput"].low < 1.0 < metrics["goodput"].high <= 1.5
    assert metrics["time_to_first_token_worst"].value == pytest.approx(1.4)


@pytest.mark.parametrize(
    ("completion", "message"),
    [
        (done("other", 0.0, 0.1, 0.2), "the server did not answer a"),
        (done("a", 1.0, 0.9, 1.1), "a has tokens before its arrival or out of order"),
        (done("a", 0.0, 0.5, 0.4), "a has tokens before its arrival or out of order"),
        (
            dataclasses.replace(done("a", 0.0, 0.1, 0.2), token_ids=(1,)),
            "a asked for 2 tokens and got 1 with 2 times",
        ),
    ],
)
def test_answers_that_are_none_are_refused(runner: Runner, completion: Completion, message: str) -> None:
    runner.server = Recorded([completion])
    with pytest.raises(MeasurementFailed, match=message):
        serving.serve(runner, [Request("a", (1, 2), 2)])


def test_a_real_batch_produces_every_token(runner: Runner) -> None:
    prompts = workloads.token_rows(runner, [5, 9, 7])
    batch = serving.run_batch(runner, prompts, 4)
    assert (batch.size, batch.tokens) == (3, 12) and batch.seconds > 0


@pytest.mark.parametrize("moment", [1e9, 0.0])
def test_a_server_whose_clock_is_impossible_is_refused(runner: Runner, moment: float) -> None:
    runner.server = Recorded([done("row-0", 0.0, 0.0, moment)])
    with pytest.raises(MeasurementFailed, match="the server reports .* s of work in "):
        serving.run_batch(runner, [(1, 2)], 2)


def test_several_tokens_of_one_step_have_a_moment_each(runner: Runner) -> None:
    from optimizations.registry import parse
    from optimizations.session import apply_all

    undo = apply_all(runner, parse("prompt_lookup"))
    try:
        assert serving.run_batch(runner, [[5, 6, 7, 8] * 8], 12).tokens == 12
    finally:
        undo()


def test_the_best_batch_size_is_reported_and_every_pair_counts_for_the_ratio() -> None:
    curve = {
        1: Paired(before=[Batch(1, 10, 2.0)] * 3, after=[Batch(1, 10, 1.0)] * 3),
        4: Paired(before=[Batch(4, 40, 4.0)] * 3, after=[Batch(4, 40, 2.0)] * 3),
    }
    metrics = serving.batch_metrics(curve)
    assert metrics["output_tokens_per_second"].value == 20.0
    assert metrics["throughput_ratio"].value == pytest.approx(2.0)
    assert metrics["throughput_ratio"].n == 6
    assert serving.curve_notes(curve)[1] == "batch 4: 20 tok/s [20, 20], n = 3"


def test_a_curve_over_real_batches(runner: Runner, perturbed: Runner) -> None:
    curve = serving.batch_curve(runner, perturbed, SMALL)
    assert {size: len(paired) for size, paired in curve.items()} == {1: 2, 2: 2}
    assert all(batch.tokens == 3 * size for size, paired in curve.items() for batch in paired.after)
    alone = serving.batch_metrics(serving.batch_curve(None, perturbed, SMALL))
    assert alone.keys() == {"output_tokens_per_second"}


def test_a_real_poisson_load(runner: Runner, perturbed: Runner) -> None:
    load = serving.reference_load(runner, SMALL)
    metrics = serving.arrival_metrics(perturbed, load.requests, load.objective)
    assert metrics["requests_per_second"].n == SMALL.requests
    assert 0 <= metrics["goodput"].value <= metrics["requests_per_second"].value
    assert load.notes[0].startswith("4 requests arriving at ") and load.notes[1].startswith("unoptimized: ")


def test_without_a_reference_there_is_no_objective(runner: Runner) -> None:
    metrics = serving.metrics_without_reference(runner, SMALL)
    assert metrics["goodput"].value is None and "sets the objective" in str(metrics["goodput"].reason)
    assert metrics["requests_per_second"].measured


def test_the_objective_is_a_multiple_of_one_request_alone(runner: Runner) -> None:
    alone = done("alone", 0.0, 0.2, 0.3, 0.4)
    runner.server = Recorded([alone])
    rate, objective = serving.calibrate(runner, dataclasses.replace(SMALL, load=2.0))
    assert rate == pytest.approx(5.0)
    assert objective.time_to_first_token == pytest.approx(0.2 * SMALL.objective_ttft)
    assert objective.time_per_output_token == pytest.approx(0.1 * SMALL.objective_tpot)
