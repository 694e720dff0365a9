"""The token budget follows the measured step cost and backs off when steps overshoot."""

from __future__ import annotations

import random

import pytest

from optimizations.runtime.token_budget import TokenBudget


def trained(fixed: float, slope: float, noise: float = 0.0) -> TokenBudget:
    budget, source = TokenBudget(3.0, 512), random.Random(2)
    for _ in range(60):
        tokens = source.randrange(1, 200)
        budget.observe(tokens, (fixed + slope * tokens) * (1 + source.gauss(0, noise)))
    return budget


def test_a_mixed_step_takes_at_most_three_decode_steps() -> None:
    budget = trained(0.010, 1e-4)
    tokens = budget.tokens(decoding=4)
    assert (0.010 + 1e-4 * tokens) / (0.010 + 1e-4 * 4) == pytest.approx(3.0, rel=0.02)


def test_nobody_decoding_leaves_the_whole_budget() -> None:
    assert trained(0.010, 1e-4).tokens(decoding=0) == 512


def test_before_anything_is_known_the_whole_budget_is_used() -> None:
    assert TokenBudget(3.0, 256).tokens(decoding=4) == 256


def test_prefill_always_makes_progress() -> None:
    budget = trained(1e-6, 1e-3)  # every token costs a step: no room at all
    assert budget.tokens(decoding=2) >= 2 + TokenBudget.SMALLEST


def test_overshooting_steps_shrink_the_budget_and_good_ones_restore_it() -> None:
    budget = trained(0.010, 1e-4)
    wide = budget.tokens(decoding=4)
    budget.observe(4, 10.0)
    assert budget.correction == pytest.approx(TokenBudget.DECREASE)
    for _ in range(20):
        budget.tokens(decoding=4)
        budget.observe(4, 0.0104)
    assert budget.correction == 1.0
    assert budget.tokens(decoding=4) <= wide * 3


@pytest.mark.parametrize(("slowdown", "largest"), [(1.0, 64), (2.0, 8)])
def test_impossible_budgets_are_refused(slowdown: float, largest: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        TokenBudget(slowdown, largest)
