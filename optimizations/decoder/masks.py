"""What attention may see, as bytes: transformers' masks in the form that the kernels read."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Added to a score, anything below this hides a token: transformers writes the smallest value of the dtype.
HIDDEN = -1e4


class Mask(NamedTuple):
    """`seen` bool, tokens dense; strides in elements. `causal`: it only says more than causality does."""

    seen: Tensor | None
    batch: int
    query: int
    causal: bool


ALL = Mask(None, 0, 0, True)


def read_mask(mask: Tensor | None, batch: int, tokens: int, length: int) -> Mask | str:
    """The mask of a pass of `tokens` queries over `length` cached tokens, or why it takes transformers' path.

    Args:
        mask: None; [batch, at least length], zero where padded; or [1 or batch, 1, tokens, at least length], bool
            (True = seen) or float (0 where seen, very negative where not).

    Raises:
        ValueError: the shape fits neither.
    """
    if mask is None:
        return ALL
    if mask.dim() == 2:
        return _padding(mask, batch, length)
    shape = tuple(mask.shape)
    if len(shape) != 4 or shape[0] not in (1, batch) or shape[2] != tokens or shape[3] < length:
        raise ValueError(
            f"attention_mask must have shape ({batch}, {length}) or ({batch}, 1, {tokens}, {length}), got {shape}"
        )
    if shape[1] != 1:
        return "an attention mask with one plane per head"
    return _full(mask[:, 0, :, :length])


def _padding(mask: Tensor, batch: int, length: int) -> Mask:
    if mask.shape[0] != batch or mask.shape[1] < length:
        raise ValueError(
            f"attention_mask must have shape ({batch}, {length}): the input's {batch} rows and the tokens of cache and "
            f"input together; it has {tuple(mask.shape)}"
        )
    seen = mask[:, :length].bool()
    if bool(seen.all()):
        return ALL
    return Mask(seen.contiguous(), length, 0, True)


def _full(mask: Tensor) -> Mask | str:
    if mask.dtype != torch.bool:
        seen = mask == 0
        if not bool((seen | (mask <= HIDDEN)).all()):
            return "an attention mask that adds to the scores"
        mask = seen
    mask = mask.contiguous()
    rows = mask.shape[0] > 1
    return Mask(mask, mask.stride(0) if rows else 0, mask.stride(1), False)


class GrowingMask:
    """Padding of a batch that gains one token after another; memory is made ahead, as the cache's is.

    Args:
        mask: [batch, length], zero where padded; None: nothing is.
    """

    def __init__(self, mask: Tensor | None) -> None:
        self._seen = None if mask is None else mask.bool().contiguous()

    def of(self, length: int) -> Mask:
        """One query over the first `length` tokens; those after the given ones are all seen."""
        if self._seen is None:
            return ALL
        if length > self._seen.shape[1]:
            more = self._seen.new_ones((self._seen.shape[0], length))
            self._seen = torch.cat((self._seen, more), dim=1)
        return Mask(self._seen, self._seen.shape[1], 0, True)
