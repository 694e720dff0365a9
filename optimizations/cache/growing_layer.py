"""What cache layers of ours share: memory allocated ahead, a length, and how transformers asks about both."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

# A new cache gets room for this many tokens beyond what comes first, a full one grows by a quarter: a token is copied
# four times at most in its life, and at most a fifth of the memory is unused.
ROOM = 64
GROWTH = 1.25
BLOCK = 16  # capacities are multiples of it: the int8 cache keeps sixteen tokens together


class GrowingLayer(CacheLayerMixin):
    """One decoder layer's cache in memory that is made ahead of the tokens; `length` of them are there.

    `version` counts changes of the memory's place, for whoever keeps its addresses.
    """

    is_sliding = False
    is_croppable = True
    is_compileable = False

    def __init__(self) -> None:
        super().__init__()
        self.length = 0
        self.version = 0

    @property
    @abstractmethod
    def capacity(self) -> int:
        """Tokens there is room for."""

    @property
    @abstractmethod
    def batch(self) -> int:
        """Rows, 0 before the first token."""

    @abstractmethod
    def forget(self) -> None:
        """Gives the memory back."""

    @abstractmethod
    def batch_select_indices(self, indices: Tensor) -> None:
        """Row i of the batch becomes row indices[i]; the batch may grow or shrink."""

    def grown(self, tokens: int) -> int:
        """The capacity to move to when `tokens` have to fit."""
        return blocks(max(tokens, int(self.capacity * GROWTH)))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        """Forgets everything and gives the memory back."""
        self.forget()
        self.length = 0
        self.version += 1
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Drops the last `-tokens_to_remove` tokens; the memory stays for the next ones."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to drop, got {tokens_to_remove}")
        self.length = max(0, self.length + tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row of the batch `repeats` times."""
        if self.is_initialized:
            self.batch_select_indices(torch.arange(self.batch).repeat_interleave(repeats))


def blocks(tokens: int) -> int:
    """The next multiple of `BLOCK`."""
    return -(-tokens // BLOCK) * BLOCK
