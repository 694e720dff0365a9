"""What a task yields, and the procedural tasks for text.

Every task draws from its own seeded generator, so an example depends on (task settings, seed, index) and on
nothing else. Answers are exact: one right sequence of tokens, checked token by token.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from pytest_inferencepio.tasks.symbols import CALCULATE, COPY, RECALL, SYMBOLS


@dataclass(frozen=True)
class Example:
    """One question: prompt and answer as token ids; tokens between evidence and query; RGB image (H, W, 3)."""

    task: str
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    distance: int | None = None
    image: np.ndarray | None = None


class Task(Protocol):
    """A seeded source of examples."""

    @property
    def name(self) -> str:
        """What the task is called in scores and records."""

    def examples(self, tokenizer: Any, n: int, seed: int) -> list[Example]:
        """`n` examples, the same for the same seed and tokenizer."""


def symbol_ids(tokenizer: Any) -> list[int]:
    """The ids of the task symbols, one token each; ValueError for a tokenizer without them."""
    ids = tokenizer.convert_tokens_to_ids(list(SYMBOLS))
    unknown = tokenizer.unk_token_id
    if None in ids or (unknown is not None and unknown in ids):
        raise ValueError(
            f"The tokenizer lacks the task symbols {SYMBOLS[0]} to {SYMBOLS[-1]}; tasks with exact answers need a "
            "reference checkpoint's tokenizer. Use perplexity for other checkpoints."
        )
    return list(ids)


def task_random(name: str, seed: int) -> random.Random:
    """A generator of the task's own, so that tasks do not shift each other."""
    digest = hashlib.sha256(f"{name}:{seed}".encode()).digest()
    return random.Random(int.from_bytes(digest[:8], "big"))


def draw_pairs(rng: random.Random, symbols: Sequence[int], n: int) -> list[tuple[int, int, int]]:
    """`n` (key, value, value) triples in which no symbol occurs twice."""
    drawn = rng.sample(symbols, 3 * n)
    return [(drawn[3 * i], drawn[3 * i + 1], drawn[3 * i + 2]) for i in range(n)]


@dataclass(frozen=True)
class Retrieval:
    """Key-value pairs first, then `distance` tokens of held-out text, then one key: name its two values.

    Chance is 1 / pairs for the first value. The distance is counted from the last pair to the query, so the
    queried pair is at least that far back and all prompts of a distance have one length.
    """

    distances: tuple[int, ...] = (64, 256, 512, 1024)
    pairs: int = 16
    name: str = "retrieval"

    def examples(self, tokenizer: Any, n: int, seed: int) -> list[Example]:
        """`n` examples that go through the distances in turn."""
        from pytest_inferencepio.tasks.text import heldout_tokens

        symbols, rng = symbol_ids(tokenizer), task_random(self.name, seed)
        recall = tokenizer.convert_tokens_to_ids(RECALL)
        text = heldout_tokens(tokenizer, 12288)
        return [
            self._example(rng, symbols, recall, text, self.distances[i % len(self.distances)])
            for i in range(n)
        ]

    def _example(
        self, rng: random.Random, symbols: list[int], recall: int, text: list[int], distance: int
    ) -> Example:
        pairs = draw_pairs(rng, symbols, self.pairs)
        key, *values = rng.choice(pairs)
        start = rng.randrange(len(text) - distance)
        listed = [token for pair in pairs for token in pair]
        prompt = [recall, *listed, *text[start : start + distance], recall, key]
        return Example(self.name, tuple(prompt), tuple(values), distance)


@dataclass(frozen=True)
class Copy:
    """A string of distinct random symbols between two markers: repeat it."""

    length: int = 16
    name: str = "copy"

    def examples(self, tokenizer: Any, n: int, seed: int) -> list[Example]:
        """`n` strings of `length` symbols each."""
        symbols, rng = symbol_ids(tokenizer), task_random(self.name, seed)
        marker = tokenizer.convert_tokens_to_ids(COPY)
        return [self._example(rng.sample(symbols, self.length), marker) for _ in range(n)]

    def _example(self, drawn: list[int], marker: int) -> Example:
        return Example(self.name, (marker, *drawn, marker), tuple(drawn), self.length)


def is_heldout_sum(left: int, right: int) -> bool:
    """Whether training never sees this ordered pair of summands (1 in 16, by hash)."""
    return hashlib.sha256(f"{left}+{right}".encode()).digest()[0] % 16 == 0


def sum_text(left: int, right: int) -> tuple[str, str]:
    """Question and answer of an addition of two-digit numbers, every number written lowest digit first.

    So each digit of the sum stands five and two tokens after the digits it is made of, and a carry comes from the
    digit before it (Lee et al. 2023, "Teaching Arithmetic to Small Transformers", reverse format).
    """
    return f"{left:02d}"[::-1] + "+" + f"{right:02d}"[::-1] + "=", f"{left + right:03d}"[::-1]


@dataclass(frozen=True)
class Arithmetic:
    """Two-digit additions, lowest digit first, whose pair of summands was never trained on."""

    name: str = "arithmetic"

    def examples(self, tokenizer: Any, n: int, seed: int) -> list[Example]:
        """`n` held-out additions."""
        rng = task_random(self.name, seed)
        heldout = [(a, b) for a in range(100) for b in range(100) if is_heldout_sum(a, b)]
        return [self._example(tokenizer, *rng.choice(heldout)) for _ in range(n)]

    def _example(self, tokenizer: Any, left: int, right: int) -> Example:
        question, answer = sum_text(left, right)
        prompt = tokenizer(CALCULATE + question, add_special_tokens=False)["input_ids"]
        return Example(self.name, tuple(prompt), tuple(tokenizer.convert_tokens_to_ids(list(answer))))


TEXT_TASKS: tuple[Task, ...] = (Retrieval(), Copy(), Arithmetic())
