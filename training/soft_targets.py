"""The trigram's whole distribution as a soft target for text tokens.

One sampled token a position is a noisy target; the Kneser-Ney trigram of the same training text gives all of
its follower statistics at once, so that local statistics are learned from a few million tokens. The share of the
soft target follows the learning rate down to zero: the end of training is on the text itself.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pytest_inferencepio.tasks.ngram import Trigram


class SoftTargets:
    """Trigram probabilities of every next token, dense bigram rows plus sparse trigram shares."""

    def __init__(self, tokens: np.ndarray, vocabulary: int) -> None:
        """Counts `tokens`; the bigram matrix takes 4 * vocabulary^2 bytes (13 MB)."""
        model = Trigram(tokens, vocabulary)
        self.vocabulary = vocabulary
        pairs = np.arange(vocabulary**2)
        lower = model._unigrams[pairs % vocabulary]
        bigrams = model._bigrams.mix(pairs, vocabulary, lower).astype(np.float32)
        self.bigrams = torch.from_numpy(bigrams).view(vocabulary, vocabulary)
        order = model._trigrams
        self.contexts = torch.from_numpy(order.contexts)
        self.left = torch.from_numpy((order.discount * order.followers / order.totals).astype(np.float32))
        total = np.repeat(order.totals, order.followers.astype(np.int64))
        self.shares = torch.from_numpy(((order.counts - order.discount) / total).astype(np.float32))
        self.last = torch.from_numpy(order.keys % vocabulary)
        self.counts = torch.from_numpy(order.followers.astype(np.int64))
        self.starts = self.counts.cumsum(0) - self.counts

    def __call__(self, before: Tensor, previous: Tensor) -> Tensor:
        """Distributions (positions, vocabulary) float32 after the token pairs (before, previous)."""
        wanted = before * self.vocabulary + previous
        index = torch.searchsorted(self.contexts, wanted).clamp(max=len(self.contexts) - 1)
        known = self.contexts[index] == wanted
        target = self.bigrams[previous] * torch.where(known, self.left[index], 1.0)[:, None]
        rows = torch.nonzero(known).flatten()
        counts = self.counts[index[rows]]
        row = rows.repeat_interleave(counts)
        within = torch.arange(len(row)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        entry = self.starts[index[rows]].repeat_interleave(counts) + within
        return target.index_put_((row, self.last[entry]), self.shares[entry], accumulate=True)
