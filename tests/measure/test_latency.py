"""Latency figures: arithmetic on known generations, and a real generation."""

from __future__ import annotations

import pytest

from optimizations.runner import Runner
from pytest_inferencepio import workloads
from pytest_inferencepio.measure import latency
from pytest_inferencepio.measure.latency import Generation
from pytest_inferencepio.measure.timing import Paired
from pytest_inferencepio.suite.shared import steps_metric


def known(first: float, gap: float, n: int = 4) -> Generation:
    return Generation(100, first, (gap,) * n, first + n * gap)


@pytest.fixture
def paired() -> Paired[Generation]:
    """Five pairs, drifting, the after side with half the first-token time and a quarter of the gaps."""
    drift = (1.0, 1.5, 0.7, 2.0, 1.2)
    return Paired(
        before=[known(0.2 * d, 0.04 * d) for d in drift], after=[known(0.1 * d, 0.01 * d) for d in drift]
    )


def test_ratios_are_pair_by_pair(paired: Paired[Generation]) -> None:
    metrics = latency.speed_metrics(paired)
    assert metrics["prefill_speedup"].value == pytest.approx(2.0)
    assert metrics["decode_speedup"].value == pytest.approx(4.0)
    assert metrics["speedup"].value == pytest.approx(0.36 / 0.14)
    assert metrics["decode_speedup"].samples == pytest.approx((4.0,) * 5)
    assert metrics["decode_speedup"].n == 5


def test_figures_of_the_after_side(paired: Paired[Generation]) -> None:
    metrics = latency.speed_metrics(paired)
    assert metrics["time_to_first_token"].value == pytest.approx(0.12)
    assert metrics["time_to_first_token_worst"].value == pytest.approx(0.2)
    assert metrics["time_per_output_token"].value == pytest.approx(0.012)
    assert metrics["time_per_output_token_worst"].value == pytest.approx(0.02)
    assert metrics["time_per_output_token_worst"].n == 20
    assert metrics["prefill_tokens_per_second"].value == pytest.approx(100 / 0.12)
    assert metrics["decode_tokens_per_second"].value == pytest.approx(1 / 0.012)
    assert metrics["total_time"].value == pytest.approx(0.12 + 0.048)


def test_without_a_reference_there_are_no_ratios(paired: Paired[Generation]) -> None:
    metrics = latency.speed_metrics(Paired(after=paired.after))
    assert "speedup" not in metrics and metrics["time_to_first_token"].measured


def test_tokens_of_one_speculative_step_have_no_time_between_them() -> None:
    at_once = [Generation(10, 0.1, (0.0, 0.0), 0.1)] * 5
    metrics = latency.speed_metrics(Paired(before=[known(0.1, 0.1)] * 5, after=at_once))
    assert metrics["decode_speedup"].value is None
    assert "all tokens came out of one step" in str(metrics["decode_speedup"].reason)
    assert metrics["decode_tokens_per_second"].value is None
    assert metrics["speedup"].measured


def test_break_even_is_conversion_over_the_time_saved(paired: Paired[Generation]) -> None:
    found = latency.break_even_tokens(3.6, paired.before, paired.after)
    assert found.value == pytest.approx(3.6 / (0.048 - 0.012))
    never = latency.break_even_tokens(3.6, paired.after, paired.before)
    assert never.value is None and "never pays back" in str(never.reason)


def test_a_real_generation_has_a_moment_per_token(runner: Runner) -> None:
    inputs = workloads.prompt(runner, 20)
    generation = latency.generate_once(runner, inputs, 6)
    assert generation.prompt_tokens == 20 and len(generation.gaps) == 5
    assert generation.time_to_first_token > 0 and min(generation.gaps) > 0
    assert generation.time_to_first_token + generation.decode_seconds <= generation.total


def test_one_token_has_no_time_per_output_token(runner: Runner) -> None:
    with pytest.raises(ValueError, match="needs two tokens or more, got 1"):
        latency.generate_once(runner, workloads.prompt(runner, 4), 1)


def test_a_runner_that_records_too_few_moments_is_caught(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(runner), "timed_generate", lambda self, n, **inputs: (None, [0.0]))
    with pytest.raises(ValueError, match="4 tokens were asked for, 1 moments were recorded"):
        latency.generate_once(runner, workloads.prompt(runner, 4), 4)


def test_pairs_of_real_generations(runner: Runner, perturbed: Runner) -> None:
    pairs = latency.interleaver(runner, perturbed, workloads.prompt(runner, 8), 3, warmup=1)
    for _ in range(4):
        pairs.setup()
        pairs.run_after()
        pairs.teardown()
    metrics = latency.speed_metrics(pairs.paired)
    assert metrics["speedup"].n == 3 and metrics["speedup"].measured


def test_tokens_per_step_are_those_of_all_generations_together() -> None:
    """One generation in three had a draft accepted: three tokens in one step."""
    plain = Generation(4, 1.0, (0.1, 0.1, 0.1, 0.1), 1.4)
    drafted = Generation(4, 1.0, (0.1, 0.0, 0.0, 0.1), 1.2)
    found = steps_metric([plain, drafted, plain])
    assert (found.value, found.low, found.high, found.n) == (12 / 10, 1.0, 2.0, 3)
    assert steps_metric([plain]).value == 1.0
