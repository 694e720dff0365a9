"""The tokens of a batch while it grows, in memory that is made ahead."""

from __future__ import annotations

import torch
from torch import Tensor

ROOM = 256  # tokens beyond the prompt at first; doubled when full


class TokenIds:
    """Token ids [B, length]; appending one per row copies nothing.

    Args:
        ids: int64 [B, prompt].
    """

    def __init__(self, ids: Tensor) -> None:
        self.rows, self.length = ids.shape
        # int64 whatever the prompt's dtype is, as torch.cat would make it: native steps read and write this memory.
        self.memory = torch.empty((self.rows, self.length + ROOM), dtype=torch.int64)
        self.memory[:, : self.length] = ids

    def reserve(self) -> None:
        """Room for one more token per row."""
        if self.length == self.memory.shape[1]:
            self.memory = torch.cat((self.memory, torch.empty_like(self.memory)), dim=1)

    def append(self, tokens: Tensor) -> None:
        """int64 [B]."""
        self.reserve()
        self.memory[:, self.length] = tokens
        self.length += 1

    def replace_last(self, row: int, token: int) -> None:
        """Another last token for one row."""
        self.memory[row, self.length - 1] = token

    def last(self) -> Tensor:
        """int64 [B]: a copy of the last token of every row."""
        return self.memory[:, self.length - 1].clone()

    def all(self) -> Tensor:
        """int64 [B, length], dense; later tokens leave it as it is."""
        return self.memory[:, : self.length].contiguous()
