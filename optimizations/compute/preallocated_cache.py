"""A key/value cache allocated once, whose decode step is a plain function of tensors, so that it compiles once."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


class PreallocatedLayer(CacheLayerMixin):
    """Keys [B, heads, size, key width] and values [B, heads, size, value width], filled from the left.

    Unlike transformers' StaticLayer, attention reads only the filled slots (no mask over empty ones, no work on
    them), and the tensors carry no static address, which would tie a compiled layer to one cache. A cache
    continued past its size grows once, by doubling.
    """

    is_compileable = False  # of the whole model, by generate(): its masks would cover the empty slots
    is_sliding = False

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        # One slot more than is ever filled: a view of the filled slots is then never contiguous, so compiled
        # code is specialized to one kind of strides and not to two.
        self.keys = key_states.new_zeros(*key_states.shape[:2], self.size + 1, key_states.shape[-1])
        self.values = value_states.new_zeros(*value_states.shape[:2], self.size + 1, value_states.shape[-1])
        self.is_initialized = True

    def reserve(self, more: int) -> None:
        """Make room for `more` tokens."""
        if self.length + more <= self.size:
            return
        self.size = max(2 * self.size, self.length + more)
        keys, values = self.filled()
        self.lazy_initialization(keys, values)
        self.keys[:, :, : self.length] = keys
        self.values[:, :, : self.length] = values

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append and return all filled slots."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, count = self.length, key_states.shape[-2]
        self.reserve(count)
        self.length = start + count
        self.keys[:, :, start : self.length] = key_states
        self.values[:, :, start : self.length] = value_states
        return self.filled()

    def filled(self, more: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of the filled slots and `more` behind them."""
        end = self.length + more
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length of what the next `update` returns, and its offset."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        """-1: it grows."""
        return -1

    def reset(self) -> None:
        """Forget everything; the memory is kept."""
        self.length = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; their number comes negated, as in transformers."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the negative number of tokens to remove, got {tokens_to_remove}")
        self.length = max(0, self.length + tokens_to_remove)


def preallocated_cache(layers: int, size: int) -> Cache:
    """A cache of `layers` layers for `size` tokens, allocated on first use."""
    return Cache(layers=[PreallocatedLayer(size) for _ in range(layers)])


class StepCache:
    """What a compiled layer sees as `past_key_values`: the filled slots, the last of which awaits this token."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.keys = keys
        self.values = values

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys[:, :, -1:] = key_states
        self.values[:, :, -1:] = value_states
        return self.keys, self.values
