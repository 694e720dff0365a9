"""Throughput: real batches, and requests that arrive in real time at the runner's server."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from optimizations.serving import Completion, Request
from pytest_inferencepio import stats, workloads
from pytest_inferencepio.errors import MeasurementFailed
from pytest_inferencepio.measure.metrics import from_estimate
from pytest_inferencepio.measure.timing import Paired, interleave
from pytest_inferencepio.record import Metric, metric, not_measured

if TYPE_CHECKING:
    from optimizations.runner import Runner
    from pytest_inferencepio.measure.budget import Budget


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a request must keep to count for goodput: seconds to its first token and per later token."""

    time_to_first_token: float
    time_per_output_token: float

    def met_by(self, completion: Completion) -> bool:
        return (
            completion.time_to_first_token <= self.time_to_first_token
            and completion.time_per_output_token <= self.time_per_output_token
        )


@dataclasses.dataclass(frozen=True)
class Load:
    """Requests that arrive in real time, the objective they are to keep, and sentences about both."""

    requests: tuple[Request, ...]
    objective: Objective
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Batch:
    """One batch that ran to its end: size, output tokens of all rows, seconds."""

    size: int
    tokens: int
    seconds: float

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def run_batch(runner: Runner, prompts: Sequence[Sequence[int]], new_tokens: int) -> Batch:
    """All prompts at once through the runner's server, each to exactly `new_tokens`.

    The seconds are the server's, from the moment it takes requests to the last token: an engine that first
    has to start is not slower for it.

    Raises:
        MeasurementFailed: the server's times exceed the time that passed here.
    """
    requests = [Request(f"row-{index}", tuple(row), new_tokens) for index, row in enumerate(prompts)]
    start = time.perf_counter()
    completions = serve(runner, requests)
    passed = time.perf_counter() - start
    seconds = max(completion.token_times[-1] for completion in completions)
    if not 0 < seconds <= passed:
        raise MeasurementFailed(f"the server reports {seconds:.4g} s of work in {passed:.4g} s")
    return Batch(len(prompts), sum(len(completion.token_ids) for completion in completions), seconds)


def serve(runner: Runner, requests: Sequence[Request]) -> list[Completion]:
    """Drive the runner's server and check that it really answered.

    Raises:
        MeasurementFailed: a request is missing, was cut short, or has tokens before it arrived.
    """
    assert runner.server is not None
    completions = runner.server.serve(requests)
    asked = {request.request_id: request for request in requests}
    answered = {completion.request.request_id for completion in completions}
    if missing := sorted(asked.keys() - answered):
        raise MeasurementFailed(f"the server did not answer {', '.join(missing)}")
    for completion in completions:
        _check(completion)
    return completions


def _check(completion: Completion) -> None:
    request, times = completion.request, completion.token_times
    if not len(completion.token_ids) == len(times) == request.max_new_tokens:
        raise MeasurementFailed(
            f"{request.request_id} asked for {request.max_new_tokens} tokens and got {len(completion.token_ids)} "
            f"with {len(times)} times"
        )
    if times[0] < request.arrival or list(times) != sorted(times):
        raise MeasurementFailed(f"{request.request_id} has tokens before its arrival or out of order")


def batch_curve(
    before: Runner | None, after: Runner, budget: Budget, seed: int = 0
) -> dict[int, Paired[Batch]]:
    """Paired batches for each size of the budget (batch size -> pairs)."""
    return {size: _batch_pairs(before, after, size, budget, seed) for size in budget.batch_sizes}


def _batch_pairs(before: Runner | None, after: Runner, size: int, budget: Budget, seed: int) -> Paired[Batch]:
    prompts = workloads.token_rows(after, [budget.prompt_tokens] * size, seed)
    tokens = budget.request_new_tokens
    return interleave(
        None if before is None else (lambda: run_batch(before, prompts, tokens)),
        lambda: run_batch(after, prompts, tokens),
        budget.batch_pairs,
        seed=seed,
        device=after.model.device,
    )


def batch_metrics(curve: dict[int, Paired[Batch]]) -> dict[str, Metric]:
    """`output_tokens_per_second` of the best batch size, and `throughput_ratio` over all pairs of all sizes."""
    best = max(curve, key=lambda size: stats.median([batch.rate for batch in curve[size].after]))
    rates = [batch.rate for batch in curve[best].after]
    found = {
        "output_tokens_per_second": from_estimate(
            "output_tokens_per_second", stats.median_estimate(rates), rates
        )
    }
    before = [batch.seconds for paired in curve.values() for batch in paired.before]
    after = [batch.seconds for paired in curve.values() for batch in paired.after]
    if before:
        ratios = [b / a for b, a in zip(before, after, strict=True)]
        found["throughput_ratio"] = from_estimate(
            "throughput_ratio", stats.speedup_estimate(before, after), ratios
        )
    return found


def curve_notes(curve: dict[int, Paired[Batch]]) -> list[str]:
    """One sentence per batch size: output tokens/s with interval and count."""
    notes = []
    for size, paired in curve.items():
        e = stats.median_estimate([batch.rate for batch in paired.after])
        notes.append(f"batch {size}: {e.value:.4g} tok/s [{e.low:.4g}, {e.high:.4g}], n = {e.n}")
    return notes


def calibrate(reference: Runner, budget: Budget, seed: int = 0) -> tuple[float, Objective]:
    """Arrival rate (requests/s) and objective for this machine, from one request alone on `reference`.

    Both sides of a comparison get the same load and objective, so a faster model shows.
    """
    prompt = workloads.token_rows(reference, [budget.prompt_tokens], seed)
    request = Request("alone", tuple(prompt[0]), budget.request_new_tokens)
    serve(reference, [request])  # warm-up
    (alone,) = serve(reference, [request])
    rate = budget.load / alone.token_times[-1]
    return rate, Objective(
        budget.objective_ttft * alone.time_to_first_token,
        budget.objective_tpot * alone.time_per_output_token,
    )


def arrival_metrics(runner: Runner, requests: Sequence[Request], objective: Objective) -> dict[str, Metric]:
    """`requests_per_second`, `goodput` (requests/s that met the objective), tail of the first token.

    Rates are counts over the time from the first arrival to the last token; goodput's interval is Wilson's of
    the share that met the objective.
    """
    completions = serve(runner, requests)
    begin = min(request.arrival for request in requests)
    seconds = max(completion.token_times[-1] for completion in completions) - begin
    share = stats.wilson(sum(map(objective.met_by, completions)), len(completions))
    rate = len(completions) / seconds
    first = stats.quantile_estimate([c.time_to_first_token for c in completions], 1.0)
    return {
        "requests_per_second": metric("requests_per_second", rate, n=len(completions)),
        "goodput": metric("goodput", rate * share.value, rate * share.low, rate * share.high, share.n),
        "time_to_first_token_worst": from_estimate("time_to_first_token_worst", first),
    }


def reference_load(before: Runner, budget: Budget, seed: int = 0) -> Load:
    """A Poisson load calibrated on `before`, and what `before` makes of it."""
    load = _poisson_load(before, budget, seed)
    served = arrival_metrics(before, load.requests, load.objective)
    return dataclasses.replace(load, notes=(*load.notes, _summary("unoptimized", served)))


def metrics_without_reference(after: Runner, budget: Budget, seed: int = 0) -> dict[str, Metric]:
    """A Poisson load calibrated on the optimized model itself, where goodput would mean nothing."""
    load = _poisson_load(after, budget, seed)
    reason = "the unoptimized model, which sets the objective, does not fit beside this one"
    return {
        **arrival_metrics(after, load.requests, load.objective),
        "goodput": not_measured("goodput", reason),
    }


def _poisson_load(runner: Runner, budget: Budget, seed: int) -> Load:
    rate, objective = calibrate(runner, budget, seed)
    requests = workloads.poisson_requests(
        runner, budget.requests, rate, budget.prompt_tokens, budget.request_new_tokens, seed
    )
    note = (
        f"{len(requests)} requests arriving at {rate:.3g}/s; goodput counts those with the first token within "
        f"{objective.time_to_first_token:.3g} s and {objective.time_per_output_token:.3g} s per later token"
    )
    return Load(tuple(requests), objective, (note,))


def _summary(who: str, metrics: dict[str, Metric]) -> str:
    served, good = metrics["requests_per_second"], metrics["goodput"]
    return f"{who}: {served.value:.3g} requests/s, goodput {good.value:.3g} requests/s"
