"""Where did the last tokens occur before, and what came next? Constant work per token."""

from __future__ import annotations

from collections.abc import Iterable


class NgramIndex:
    """Continuation of the latest earlier occurrence of the sequence's suffix, longest suffix first.

    One dictionary per n-gram size; appending a token costs `max_ngram` insertions, whatever the length
    (transformers' own lookup slides a window over the whole sequence at every step).
    """

    def __init__(self, max_ngram: int = 3, min_ngram: int = 1) -> None:
        if not 1 <= min_ngram <= max_ngram:
            raise ValueError(f"need 1 <= min_ngram <= max_ngram, got {min_ngram} and {max_ngram}")
        self.max_ngram = max_ngram
        self.min_ngram = min_ngram
        self.tokens: list[int] = []
        self._follows: dict[int, dict[tuple[int, ...], int]] = {
            size: {} for size in range(min_ngram, max_ngram + 1)
        }

    def extend(self, tokens: Iterable[int]) -> None:
        """Append tokens. What ends just before a token is indexed when the token arrives, so that a lookup
        never finds the suffix itself."""
        for token in tokens:
            position = len(self.tokens)
            for size, follows in self._follows.items():
                if position >= size:
                    follows[tuple(self.tokens[position - size :])] = position
            self.tokens.append(int(token))

    def continuation(self, length: int) -> list[int]:
        """Up to `length` tokens that followed the longest matching suffix; empty without a match.

        A continuation that runs into the end of the sequence goes on with its own tokens, as LZ77's
        overlapping copies do, so that a loop is drafted at full length.
        """
        for size in range(min(self.max_ngram, len(self.tokens)), self.min_ngram - 1, -1):
            start = self._follows[size].get(tuple(self.tokens[-size:]))
            if start is not None:
                return self._copy(start, length)
        return []

    def _copy(self, start: int, length: int) -> list[int]:
        draft: list[int] = []
        end = len(self.tokens)
        for source in range(start, start + length):
            draft.append(self.tokens[source] if source < end else draft[source - end])
        return draft
