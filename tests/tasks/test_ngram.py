"""The trigram is a probability and agrees with Kneser-Ney written out by hand."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from pytest_inferencepio.tasks.ngram import Trigram


def by_hand(tokens: list[int], vocabulary: int, context: tuple[int, int], word: int) -> float:
    three = Counter(zip(tokens, tokens[1:], tokens[2:], strict=False))
    two = Counter((b, c) for _, b, c in three)
    one = Counter(b for _, b in set(itertools.pairwise(tokens)))

    def discount(counts: Counter) -> float:
        n1, n2 = (sum(v == k for v in counts.values()) for k in (1, 2))
        return n1 / (n1 + 2 * n2) if n1 else 0.5

    def level(counts: Counter, history: tuple[int, ...], lower: float) -> float:
        here = {key[-1]: value for key, value in counts.items() if key[:-1] == history}
        if not here:
            return lower
        total, d = sum(here.values()), discount(counts)
        return max(here.get(word, 0) - d, 0) / total + d * len(here) / total * lower

    unigram = (one[word] + 0.5) / (sum(one.values()) + 0.5 * vocabulary)
    return level(three, context, level(two, context[1:], unigram))


@pytest.fixture(scope="module")
def text() -> list[int]:
    return np.random.default_rng(0).zipf(1.6, 400).clip(max=11).tolist()


def test_probabilities_sum_to_one_for_seen_and_unseen_contexts(text: list[int]) -> None:
    model = Trigram(text, 12)
    for context in ((text[5], text[6]), (11, 0), (0, 0)):
        total = sum(model.probabilities([*context, word])[0] for word in range(12))
        assert total == pytest.approx(1.0, abs=1e-12)


def test_agrees_with_the_formula_written_out(text: list[int]) -> None:
    model = Trigram(text, 12)
    for start in range(0, 40, 7):
        context = (text[start], text[start + 1])
        for word in (1, 2, 5, 11):
            expected = by_hand(text, 12, context, word)
            assert model.probabilities([*context, word])[0] == pytest.approx(expected, rel=1e-12)


def test_perplexity_is_lower_on_what_was_counted(text: list[int]) -> None:
    model = Trigram(text, 12)
    other = np.random.default_rng(1).integers(0, 12, 300)
    assert model.perplexity(text) < model.perplexity(other)
    assert math.isfinite(model.perplexity(other))


def test_too_little_text_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 3 tokens, got 2"):
        Trigram([1, 2], 5)
