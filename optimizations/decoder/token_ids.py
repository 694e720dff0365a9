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
        self.memory = ids.new_empty((self.rows, self.length + ROOM))
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

    def last(self) -> Tensor:
        """int64 [B]: the last token of every row, which later ones leave as it is."""
        return self.memory[:, self.length - 1]

    def all(self) -> Tensor:
        """int64 [B, length], dense; later tokens leave it as it is."""
        return self.memory[:, : self.length].contiguous()
