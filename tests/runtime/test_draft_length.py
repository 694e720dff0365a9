"""The draft length follows acceptance and cost."""

from __future__ import annotations

import random

import pytest

from optimizations.runtime.draft_length import DraftLength


def simulate(probability: float, slope: float, steps: int = 200, longest: int = 12) -> DraftLength:
    """Feed a controller with drafts accepted with `probability` per token at a cost of 1 + slope * length."""
    source, controller = random.Random(3), DraftLength(longest)
    for _ in range(steps):
        length = controller.choose()
        matched = 0
        while matched < length and source.random() < probability:
            matched += 1
        controller.observe(length, matched, 1.0 + slope * length)
    return controller


def test_free_verification_and_certain_acceptance_draft_all() -> None:
    assert simulate(1.0, 0.0).choose() == 12


def test_text_that_never_repeats_is_not_drafted_but_probed() -> None:
    controller = simulate(0.0, 0.5)
    chosen = [controller.choose() for _ in range(3 * DraftLength.PROBE_EVERY)]
    assert set(chosen) == {0, 2}
    assert chosen.count(2) == 3


def test_dearer_verification_shortens_the_draft() -> None:
    cheap, dear = simulate(0.8, 0.02).choose(), simulate(0.8, 0.3).choose()
    assert 1 <= dear < cheap


def test_cost_is_recovered_from_noisy_times() -> None:
    controller, source = DraftLength(8), random.Random(5)
    for _ in range(300):
        length = source.randrange(9)
        controller.observe(length, length, 0.010 + 0.002 * length + source.gauss(0, 2e-4))
    fixed, slope = controller.cost()
    assert fixed == pytest.approx(0.010, rel=0.05)
    assert slope == pytest.approx(0.002, rel=0.05)


def test_one_length_alone_keeps_the_prior_slope() -> None:
    controller = DraftLength(8)
    controller.observe(4, 4, 0.014)
    fixed, slope = controller.cost()
    assert fixed == pytest.approx(0.010)
    assert slope == pytest.approx(0.001)


def test_a_draft_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 token, got 0"):
        DraftLength(0)
