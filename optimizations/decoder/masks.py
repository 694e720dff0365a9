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
