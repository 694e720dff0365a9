"""Training rows: right weights, nothing held out, the same for a step."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from pytest_inferencepio.tasks.examples import is_heldout_sum
from pytest_inferencepio.tasks.ngram import Trigram
from pytest_inferencepio.tasks.text import Corpus, read_corpus
from training.rows import ANSWER, RowMaker


@pytest.fixture(scope="module")
def rows(tokenizer: PreTrainedTokenizerBase) -> RowMaker:
    corpus = read_corpus()
    return RowMaker(Corpus(corpus.train[:12], corpus.heldout, corpus.digest), tokenizer, seed=1)


def test_a_step_fixes_its_batch(rows: RowMaker) -> None:
    first, again, other = rows.batch(7, 2048), rows.batch(7, 2048), rows.batch(8, 2048)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert first[0].shape != other[0].shape or not torch.equal(first[0], other[0])
    assert first[0].numel() == 2048


def test_no_heldout_sum_is_trained_on(rows: RowMaker, tokenizer: PreTrainedTokenizerBase) -> None:
    for tokens, _ in rows.sums.values():
        left, right = tokenizer.decode(tokens).removeprefix("<|calculate|>").split("=")[0].split("+")
        assert not is_heldout_sum(int(left[::-1]), int(right[::-1]))
    assert len(rows.sums) > 9000


@pytest.mark.parametrize("length", [256, 1024])
def test_retrieval_answers_follow_their_key_in_the_list(rows: RowMaker, length: int) -> None:
    tokens, weights = rows.retrieval_row(random.Random(length), length)
    assert len(tokens) == len(weights) == length
    listed = {tokens[i]: tuple(tokens[i + 1 : i + 3]) for i in range(1, weights.index(1.0), 3)}
    answers = [i for i in range(1, length) if weights[i] == ANSWER and weights[i - 1] != ANSWER]
    assert len(answers) >= 2
    for i in answers:
        assert listed[tokens[i - 1]] == tuple(tokens[i : i + 2])


@pytest.mark.parametrize("kind", ["text_row", "retrieval_row", "arithmetic_row", "copy_row"])
def test_rows_fill_their_length(rows: RowMaker, kind: str) -> None:
    make: Callable[[random.Random, int], tuple[list[int], list[float]]] = getattr(rows, kind)
    tokens, weights = make(random.Random(2), 300)
    assert len(tokens) == len(weights) >= 300
    assert max(weights) > 0


def test_soft_targets_are_the_trigram(rows: RowMaker) -> None:
    trigram = Trigram(rows.text, len(rows.tokenizer))
    before = torch.tensor([int(rows.text[40]), 3, int(rows.text[90])])
    previous = torch.tensor([int(rows.text[41]), 900, int(rows.text[91])])
    target = rows.soft(before, previous)
    torch.testing.assert_close(target.sum(-1), torch.ones(3), atol=1e-4, rtol=0)
    for row in range(3):
        for word in (int(rows.text[42]), 5, 1000):
            expected = trigram.probabilities([int(before[row]), int(previous[row]), word])[0]
            assert target[row, word].item() == pytest.approx(expected, rel=1e-4, abs=1e-9)
