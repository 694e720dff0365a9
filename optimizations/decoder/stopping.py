"""Which rows of a batch are done, by transformers' stopping criteria."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    StoppingCriteriaList,
)

from optimizations.decoder.token_ids import TokenIds

Done = Callable[[TokenIds, list[int], Any], list[bool]]


class Stopping:
    """The rows that are done after each token; a row that was done stays so.

    The criteria of `generate` itself, a maximal length and tokens that end a text, are judged without tensors; all
    others are called as transformers calls them.

    Args:
        criteria: transformers' list.
        rows: of the batch.
    """

    def __init__(self, criteria: Sequence[Any], rows: int) -> None:
        plain = type(criteria) is StoppingCriteriaList
        self._criteria = [_quick(each) for each in criteria] if plain else [_called(criteria)]
        self.ended = [False] * rows
        # After their end rows get padding.
        self.pads = any(hasattr(each, "eos_token_id") for each in criteria)

    def __call__(self, ids: TokenIds, last: list[int], scores: Any) -> bool:
        """Whether all rows are done, after `last` was appended to ids; scores as transformers' criteria get them."""
        for criterion in self._criteria:
            found = criterion(ids, last, scores)
            self.ended = [before or now for before, now in zip(self.ended, found, strict=True)]
        return all(self.ended)


def _quick(criterion: Any) -> Done:
    if type(criterion) is EosTokenCriteria:
        ends = set(criterion.eos_token_id.reshape(-1).tolist())
        return lambda ids, last, scores: [token in ends for token in last]
    if type(criterion) is MaxLengthCriteria:
        return _longest(criterion)
    return _called(criterion)


def _longest(criterion: MaxLengthCriteria) -> Done:
    reminder, ask = criterion.max_position_embeddings, _called(criterion)

    def done(ids: TokenIds, last: list[int], scores: Any) -> list[bool]:
        if reminder is not None and ids.length > reminder:
            return ask(ids, last, scores)  # it reminds of the model's own limit
        return [ids.length >= criterion.max_length] * len(last)

    return done


def _called(criterion: Any) -> Done:
    def done(ids: TokenIds, last: list[int], scores: Any) -> list[bool]:
        # Some give a single verdict for all rows, as a bool or a tensor.
        verdict = torch.as_tensor(criterion(ids.all(), scores)).reshape(-1)
        found: list[bool] = verdict.expand(len(last)).tolist()
        return found

    return done
