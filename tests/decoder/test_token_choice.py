"""Tokens and ends against transformers' own processors and criteria, object by object."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    TemperatureLogitsWarper,
)
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteriaList,
)

from optimizations.decoder import stopping
from optimizations.decoder.stopping import Stopping
from optimizations.decoder.token_choice import TokenChoice
from optimizations.decoder.token_ids import ROOM, TokenIds

ENDS = torch.tensor([3, 7, 500, -1])  # the last two are outside of the vocabulary of these tests


def logits(rows: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn((rows, 40), generator=torch.Generator().manual_seed(rows)).to(dtype)


@given(
    length=st.integers(1, 12),
    least=st.integers(0, 12),
    rows=st.integers(1, 3),
    keep=st.booleans(),
    warm=st.booleans(),
)
def test_scores_are_those_of_transformers_list(
    length: int, least: int, rows: int, keep: bool, warm: bool
) -> None:
    processors = LogitsProcessorList(
        [
            MinLengthLogitsProcessor(least, ENDS),
            MinNewTokensLengthLogitsProcessor(4, least, ENDS),
            *[TemperatureLogitsWarper(0.7)] * warm,
        ]
    )
    ids, given_logits = torch.zeros((rows, length), dtype=torch.int64), logits(rows)
    wanted = processors(ids, given_logits.float())
    choice = TokenChoice(processors, sampled=False)
    got = choice.scores(ids, given_logits.clone(), keep)
    assert torch.equal(got.float(), wanted)
    assert got.dtype == (torch.float32 if keep or warm else torch.bfloat16)
    assert torch.equal(choice.tokens(got), torch.argmax(wanted, dim=-1))


@given(length=st.integers(1, 12), least=st.integers(0, 12))
def test_what_is_forbidden_is_what_those_scores_hide(length: int, least: int) -> None:
    processors = LogitsProcessorList(
        [MinLengthLogitsProcessor(least, ENDS), MinNewTokensLengthLogitsProcessor(4, 3, torch.tensor([9]))]
    )
    choice = TokenChoice(processors, sampled=False)
    assert not choice.computes
    hidden = processors(torch.zeros((1, length), dtype=torch.int64), logits(1).float()).isneginf()[0]
    assert {end for end in choice.forbidden(length) if 0 <= end < 40} == set(
        hidden.nonzero().reshape(-1).tolist()
    )


@pytest.mark.parametrize("sampled", [False, True])
def test_sampling_and_other_processors_compute_with_scores(sampled: bool) -> None:
    warm = [TemperatureLogitsWarper(0.7)]
    assert TokenChoice(LogitsProcessorList([] if sampled else warm), sampled).computes


def test_kept_logits_are_not_written() -> None:
    given_logits = logits(2, torch.float32)
    before = given_logits.clone()
    choice = TokenChoice(LogitsProcessorList([MinLengthLogitsProcessor(9, ENDS)]), sampled=False)
    choice.scores(torch.zeros((2, 3), dtype=torch.int64), given_logits, keep=True)
    assert torch.equal(given_logits, before)


def test_a_processor_that_asks_for_more_is_named_by_transformers() -> None:
    class Odd:
        def __call__(self, input_ids: Tensor, scores: Tensor, more: Tensor) -> Tensor:
            return scores + more

    choice = TokenChoice(LogitsProcessorList([Odd()]), sampled=False)
    with pytest.raises(ValueError, match="all the required parameters.*more.*Odd"):
        choice.scores(torch.zeros((1, 2), dtype=torch.int64), logits(1), keep=False)


def test_a_list_of_the_users_own_kind_is_called_as_a_whole() -> None:
    class Reversed(LogitsProcessorList):
        def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
            return -scores

    choice = TokenChoice(Reversed(), sampled=False)
    scores = choice.scores(torch.zeros((1, 2), dtype=torch.int64), logits(1), keep=False)
    assert torch.equal(choice.tokens(scores), torch.argmin(logits(1).float(), dim=-1))


def rows_of(last: list[int], length: int) -> TokenIds:
    ids = torch.full((len(last), length), 9, dtype=torch.int64)
    ids[:, -1] = torch.tensor(last)
    return TokenIds(ids)


@given(last=st.lists(st.integers(0, 9), min_size=1, max_size=4), length=st.integers(1, 9))
def test_ended_rows_are_those_of_transformers_list(last: list[int], length: int) -> None:
    own: Callable[..., Tensor] = lambda ids, scores: ids[:, -1] == 5
    criteria = StoppingCriteriaList([MaxLengthCriteria(8), EosTokenCriteria(ENDS), MaxTimeCriteria(1e9), own])
    ids = rows_of(last, length)
    wanted = criteria(ids.all(), None).tolist()
    ended = Stopping(criteria, len(last))
    assert ended(ids, last, None) == all(wanted)
    assert ended.ended == wanted
    assert ended.pads


def test_what_ended_once_stays_so() -> None:
    ended = Stopping(StoppingCriteriaList([EosTokenCriteria(3)]), 2)
    assert not ended(rows_of([3, 4], 5), [3, 4], None)
    assert ended(rows_of([6, 3], 6), [6, 3], None)


def test_padding_is_for_criteria_that_know_an_end() -> None:
    assert not Stopping(StoppingCriteriaList([MaxLengthCriteria(4)]), 1).pads


def test_one_verdict_may_stand_for_all_rows() -> None:
    ended = Stopping(StoppingCriteriaList([lambda ids, scores: torch.tensor([True])]), 3)
    assert ended(rows_of([1, 2, 3], 4), [1, 2, 3], None)


def test_the_reminder_of_the_models_limit_is_still_given(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    class Noted(MaxLengthCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            asked.append(input_ids.shape[1])
            return super().__call__(input_ids, scores)

    monkeypatch.setattr(stopping, "MaxLengthCriteria", Noted)
    ended = Stopping(StoppingCriteriaList([Noted(9, max_position_embeddings=6)]), 1)
    assert [ended(rows_of([1], length), [1], None) for length in range(5, 10)] == [False] * 4 + [True]
    assert asked == [7, 8, 9]


def test_a_list_of_criteria_of_the_users_own_kind_is_called_as_a_whole() -> None:
    class Never(StoppingCriteriaList):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            return torch.zeros(len(input_ids), dtype=torch.bool)

    assert not Stopping(Never([MaxLengthCriteria(1)]), 1)(rows_of([1], 4), [1], None)


def test_token_ids_grow_and_what_was_given_out_stays() -> None:
    ids = TokenIds(torch.tensor([[1, 2], [3, 4]]))
    given_out = ids.all()
    for token in range(2 * ROOM):
        ids.append(torch.tensor([token, -token]))
    assert given_out.tolist() == [[1, 2], [3, 4]]
    assert ids.last().tolist() == [2 * ROOM - 1, 1 - 2 * ROOM]
    assert ids.all().tolist() == [[1, 2, *range(2 * ROOM)], [3, 4, *(-token for token in range(2 * ROOM))]]
    assert ids.all().is_contiguous()
