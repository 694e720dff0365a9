"""Training rows: fixed-length token sequences with a loss weight per token, a function of (seed, step).

Weight 0 is not trained on (keys, random strings, summands), 1 is text, `ANSWER` an exactly determined token.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pytest_inferencepio.tasks.examples import draw_pairs, is_heldout_sum, sum_text, symbol_ids
from pytest_inferencepio.tasks.symbols import CALCULATE, COPY, RECALL
from pytest_inferencepio.tasks.text import Corpus
from training.soft_targets import SoftTargets

ANSWER = 2.0
Row = tuple[list[int], list[float]]


@dataclass(frozen=True)
class Mixture:
    """Shares of rows; retrieval rows are text too, with pairs in front and queries between."""

    text: float = 0.2
    retrieval: float = 0.4
    arithmetic: float = 0.3
    copy: float = 0.1


class RowMaker:
    """Makes batches of rows of one length from the corpus and the tasks' building blocks."""

    def __init__(self, corpus: Corpus, tokenizer: Any, seed: int, mixture: Mixture | None = None) -> None:
        """Tokenizes the training files once; files are joined by the end-of-text token."""
        end = tokenizer.eos_token_id
        pieces = tokenizer([source for _, source in corpus.train], add_special_tokens=False)["input_ids"]
        self.text = np.array([token for piece in pieces for token in [end, *piece]], dtype=np.int64)
        self.symbols = symbol_ids(tokenizer)
        self.recall, self.copy, self.calculate = tokenizer.convert_tokens_to_ids([RECALL, COPY, CALCULATE])
        self.tokenizer, self.seed, self.mixture = tokenizer, seed, mixture or Mixture()

    @cached_property
    def soft(self) -> SoftTargets:
        """The trigram's distributions over the training text."""
        return SoftTargets(self.text, len(self.tokenizer))

    @cached_property
    def sums(self) -> dict[tuple[int, int], Row]:
        """Every trainable addition as tokens and weights."""
        trainable = [(a, b) for a in range(100) for b in range(100) if not is_heldout_sum(a, b)]
        return {pair: self._sum(*sum_text(*pair)) for pair in trainable}

    def draw_sum(self, rng: random.Random) -> Row:
        """Half of the additions have one summand of small digits.

        With uniform digits neither summand alone says anything about a digit of the sum, and learning stalls at
        1/10 (2.3 nats after 20,000 additions); small digits make the other summand informative.
        """
        while True:
            pair = [rng.randrange(100), rng.randrange(100)]
            if rng.random() < 0.5:
                small = [min(rng.randrange(10) for _ in range(4)) for _ in range(2)]
                pair[rng.randrange(2)] = 10 * small[0] + small[1]
            if tuple(pair) in self.sums:
                return self.sums[pair[0], pair[1]]

    def _sum(self, question: str, answer: str) -> Row:
        tokens = self.tokenizer.convert_tokens_to_ids(list(question + answer))
        return [self.calculate, *tokens], [0.0] * (1 + len(question)) + [ANSWER] * len(answer)

    def chunk(self, rng: random.Random, length: int) -> list[int]:
        """A random stretch of training text."""
        start = rng.randrange(len(self.text) - length)
        return self.text[start : start + length].tolist()

    def text_row(self, rng: random.Random, length: int) -> Row:
        """Text alone, every token trained on."""
        return self.chunk(rng, length), [1.0] * length

    def retrieval_row(self, rng: random.Random, length: int) -> Row:
        """Pairs, then text with queries scattered in it, keys drawn with replacement."""
        pairs = draw_pairs(rng, self.symbols, rng.randint(4, 24))
        tokens = [self.recall, *(token for pair in pairs for token in pair)]
        weights = [0.0] * len(tokens)
        queries = max(2, length // 64)
        room = length - len(tokens) - 4 * queries
        cuts = sorted(rng.randrange(max(room, 1)) for _ in range(queries))
        text, last = self.chunk(rng, max(room, 1)), 0
        for cut in cuts:
            piece = text[last:cut]
            tokens += [*piece, self.recall, *rng.choice(pairs)]
            weights += [*[1.0] * len(piece), 0.0, 0.0, ANSWER, ANSWER]
            last = cut
        tokens += text[last:]
        weights += [1.0] * (len(text) - last)
        return tokens, weights

    def arithmetic_row(self, rng: random.Random, length: int) -> Row:
        """Additions one after the other."""
        return self._concatenate(length, lambda: self.draw_sum(rng))

    def copy_row(self, rng: random.Random, length: int) -> Row:
        """Strings of 4 to 32 symbols, each repeated once."""
        return self._concatenate(length, lambda: self._copy(rng.sample(self.symbols, rng.randint(4, 32))))

    def _copy(self, drawn: list[int]) -> Row:
        tokens = [self.copy, *drawn, self.copy, *drawn]
        return tokens, [0.0] * (2 + len(drawn)) + [ANSWER] * len(drawn)

    def _concatenate(self, length: int, make: Any) -> Row:
        tokens: list[int] = []
        weights: list[float] = []
        while len(tokens) < length:
            more = make()
            tokens += more[0]
            weights += more[1]
        return tokens, weights

    def batch(self, step: int, n_tokens: int) -> tuple[Tensor, Tensor]:
        """ids (rows, length) int64 and weights (rows, length) float32 of this step; the lengths vary."""
        rng = random.Random(self.seed * 1_000_003 + step)
        length = rng.choices((256, 1024), (0.55, 0.45))[0]
        makers = (self.text_row, self.retrieval_row, self.arithmetic_row, self.copy_row)
        shares = (self.mixture.text, self.mixture.retrieval, self.mixture.arithmetic, self.mixture.copy)
        count = max(1, n_tokens // length)
        rows = [self._fit(make(rng, length), length) for make in _spread(rng, makers, shares, count)]
        return torch.tensor([r[0] for r in rows]), torch.tensor([r[1] for r in rows])

    def sample(self, n_tokens: int) -> Tensor:
        """Rows of 256 tokens of every kind, to measure activations on; int64 (n_tokens / 256, 256)."""
        batches = (self.batch(step, n_tokens)[0].reshape(-1, 256) for step in range(4))
        return torch.cat(list(batches))[::4]

    def _fit(self, row: Row, length: int) -> Row:
        return row[0][:length], row[1][:length]


def _spread(rng: random.Random, makers: tuple[Any, ...], shares: tuple[float, ...], count: int) -> list[Any]:
    """Systematic sampling: each kind's number of rows is its share of `count`, rounded up or down."""
    offset, total = rng.random(), sum(shares)
    edges = np.cumsum(shares) / total
    return [makers[int(np.searchsorted(edges, (i + offset) / count))] for i in range(count)]
