"""Interpolated Kneser-Ney trigram over token ids: what a model must beat to have learned more than counts.

Kneser & Ney 1995 in the interpolated form of Chen & Goodman 1999, one discount per order from the counts of
counts, n1 / (n1 + 2 n2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def _unique(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    values, counts = np.unique(keys, return_counts=True)
    return values, counts.astype(np.float64)


def _lookup(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """values[keys == wanted], 0 where there is none; `keys` sorted."""
    position = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[position] == wanted, values[position], 0.0)


def _discount(counts: np.ndarray) -> float:
    once, twice = float((counts == 1).sum()), float((counts == 2).sum())
    return once / (once + 2 * twice) if once else 0.5


@dataclass(frozen=True)
class _Order:
    """Sorted n-gram keys with counts, and per context (key // vocabulary) total count and distinct followers."""

    keys: np.ndarray
    counts: np.ndarray
    contexts: np.ndarray
    totals: np.ndarray
    followers: np.ndarray
    discount: float

    @classmethod
    def of(cls, keys: np.ndarray, counts: np.ndarray, vocabulary: int) -> _Order:
        contexts, inverse = np.unique(keys // vocabulary, return_inverse=True)
        totals = np.bincount(inverse, counts)
        return cls(keys, counts, contexts, totals, np.bincount(inverse).astype(np.float64), _discount(counts))

    def mix(self, wanted: np.ndarray, vocabulary: int, lower: np.ndarray) -> np.ndarray:
        """Probability of each n-gram's last token: discounted share plus what is left times `lower`."""
        count = _lookup(self.keys, self.counts, wanted)
        context = wanted // vocabulary
        total = _lookup(self.contexts, self.totals, context)
        followers = _lookup(self.contexts, self.followers, context)
        seen = total > 0
        total = np.where(seen, total, 1.0)
        share = np.maximum(count - self.discount, 0.0) / total
        left = np.where(seen, self.discount * followers / total, 1.0)
        return share + left * lower


class Trigram:
    """A trigram model of token ids below `vocabulary`."""

    def __init__(self, tokens: Sequence[int] | np.ndarray, vocabulary: int) -> None:
        """Counts `tokens` (at least three); seconds for millions of tokens."""
        t = np.asarray(tokens, dtype=np.int64)
        if len(t) < 3:
            raise ValueError(f"A trigram model needs at least 3 tokens, got {len(t)}.")
        self.vocabulary = vocabulary
        three, counts = _unique((t[:-2] * vocabulary + t[1:-1]) * vocabulary + t[2:])
        # Lower orders count in how many different contexts an n-gram was seen, not how often.
        two, different = _unique(three % vocabulary**2)
        one, before = _unique(np.unique(t[:-1] * vocabulary + t[1:]) % vocabulary)
        self._trigrams = _Order.of(three, counts, vocabulary)
        self._bigrams = _Order.of(two, different, vocabulary)
        self._unigrams = (np.bincount(one, before, vocabulary) + 0.5) / (before.sum() + 0.5 * vocabulary)

    def probabilities(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """Probability of tokens[2:] each given the two before it; float64 (n - 2,)."""
        t = np.asarray(tokens, dtype=np.int64)
        two = t[1:-1] * self.vocabulary + t[2:]
        lower = self._bigrams.mix(two, self.vocabulary, self._unigrams[t[2:]])
        return self._trigrams.mix(t[:-2] * self.vocabulary**2 + two, self.vocabulary, lower)

    def perplexity(self, tokens: Sequence[int] | np.ndarray) -> float:
        """exp of the mean negative log probability of tokens[2:]."""
        return math.exp(-float(np.log(self.probabilities(tokens)).mean()))
