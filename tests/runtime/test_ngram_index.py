"""The n-gram index against a search that reads everything."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimizations.runtime.ngram_index import NgramIndex


def latest_continuation(tokens: list[int], max_ngram: int, min_ngram: int, length: int) -> list[int]:
    """The same answer by brute force."""
    for size in range(min(max_ngram, len(tokens)), min_ngram - 1, -1):
        suffix = tokens[-size:]
        for start in range(len(tokens) - size - 1, -1, -1):
            if tokens[start : start + size] == suffix:
                endless = list(tokens)
                for step in range(length):
                    endless.append(endless[start + size + step])
                return endless[len(tokens) :]
    return []


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 4), st.integers(0, 12))
def test_agrees_with_a_full_search(tokens: list[int], max_ngram: int, length: int) -> None:
    index = NgramIndex(max_ngram, 1)
    index.extend(tokens)
    assert index.continuation(length) == latest_continuation(tokens, max_ngram, 1, length)


@given(st.lists(st.integers(0, 2), max_size=40), st.lists(st.integers(0, 2), max_size=40))
def test_extending_in_parts_changes_nothing(first: list[int], second: list[int]) -> None:
    whole, parts = NgramIndex(3, 2), NgramIndex(3, 2)
    whole.extend(first + second)
    parts.extend(first)
    parts.extend(second)
    assert whole.continuation(8) == parts.continuation(8)


def test_a_loop_is_drafted_at_full_length() -> None:
    index = NgramIndex(3, 2)
    index.extend([7, 8, 9, 7, 8])
    assert index.continuation(5) == [9, 7, 8, 9, 7]


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="need 1 <= min_ngram <= max_ngram, got 3 and 2"):
        NgramIndex(2, 3)
