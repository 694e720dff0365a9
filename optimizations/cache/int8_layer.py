"""The int8 cache as transformers sees it: one layer per decoder layer, a `Cache` of such layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from optimizations.cache.growing_layer import ROOM, GrowingLayer, blocks
from optimizations.native import attention
from optimizations.native.attention import BLOCK, Store, attend, new_store
from optimizations.native.attention_reference import dequantize


class Int8Layer(GrowingLayer):
    """Append-only int8 keys and values of one decoder layer; or latents and rotary keys of multi-head latent attention.

    `update` quantizes what is new and returns the layer itself in place of keys and values: the attention function
    reads the codes. Nothing is ever dequantized, so other attention functions cannot use this layer and say so.

    Args:
        key_channel: float32 [d] by which keys (or latents) are divided before quantization, or None.
        latent: the second tensor is the rotary part of the keys, and the first serves as values too.
    """

    def __init__(self, key_channel: Tensor | None = None, latent: bool = False) -> None:
        super().__init__()
        self.key_channel = key_channel
        self.latent = latent
        self.stores: list[Store] = []

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Makes room for what comes and `ROOM` tokens more; shapes [batch, heads, tokens, d]."""
        batch, heads, tokens, width = key_states.shape
        self._allocate(batch, heads, tokens, (width, value_states.shape[3]), key_states.dtype)

    def _allocate(
        self, batch: int, heads: int, tokens: int, widths: tuple[int, int], dtype: torch.dtype
    ) -> None:
        self.dtype, self.device = dtype, torch.device("cpu")
        channels = (self.key_channel, None)
        self.stores = [
            new_store(batch, heads, blocks(tokens + ROOM), width, channel)
            for width, channel in zip(widths, channels, strict=True)
        ]
        self.version += 1
        self.is_initialized = True

    def reserve(
        self, batch: int, heads: int, tokens: int, widths: tuple[int, int], dtype: torch.dtype
    ) -> None:
        """Room for `tokens` more; an empty layer gets `batch` rows of `heads` heads of these widths."""
        if not self.is_initialized:
            self._allocate(batch, heads, tokens, widths, dtype)
        elif self.length + tokens > self.capacity:
            self._grow(self.length + tokens)

    def update(  # type: ignore[override]
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Int8Layer, Int8Layer]:
        """Appends [batch, heads, tokens, d] each; returns the layer twice, for attention to read."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        needed = self.length + key_states.shape[2]
        if needed > self.capacity:
            self._grow(needed)
        for store, states in zip(self.stores, (key_states, value_states), strict=True):
            attention.append(store, states.detach(), self.length)
        self.length = needed
        return self, self

    @property
    def capacity(self) -> int:
        """Tokens there is room for."""
        return self.stores[0].capacity if self.stores else 0

    @property
    def batch(self) -> int:
        """Rows, 0 before the first token."""
        return self.stores[0].scales.shape[0] if self.stores else 0

    def _grow(self, needed: int) -> None:
        capacity = self.grown(needed)
        used = -(-self.length // BLOCK)
        self.version += 1
        for index, old in enumerate(self.stores):
            batch, heads = old.scales.shape[:2]
            fresh = new_store(batch, heads, capacity, old.dim, old.channel)
            fresh.codes[:, :, :used] = old.codes[:, :, :used]
            fresh.scales[:, :, : self.length] = old.scales[:, :, : self.length]
            self.stores[index] = fresh

    def attend(
        self,
        query: Tensor,
        scaling: float,
        mask: Tensor | None,
        causal: bool,
        query_second: Tensor | None = None,
    ) -> Tensor:
        """Attention of query [batch, heads, queries, d] over this layer -> [batch, queries, heads, d of values]."""
        keys, others = self.stores
        if self.latent:
            return attend(query, keys, keys, self.length, scaling, mask, causal, query_second, others)
        return attend(query, keys, others, self.length, scaling, mask, causal)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Keys and values (or latents and rotary keys) as dense tensors; for tests and inspection."""
        keys, values = (dequantize(store, self.length, torch.float32).to(dtype) for store in self.stores)
        return keys, values

    def forget(self) -> None:
        self.stores = []

    def batch_select_indices(self, indices: Tensor) -> None:
        """Row i of the batch becomes row indices[i]; the batch may grow or shrink."""
        self.version += 1
        self.stores = [
            Store(store.codes[indices], store.scales[indices], store.channel) for store in self.stores
        ]

    def offload(self) -> NoReturn:
        raise NotImplementedError("kv_int8 lies in host memory already; use a cache without offloading")

    prefetch = offload

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(
            f"an int8 cache layer is not a tensor and has no {name!r}; it is read by the attention function of kv_int8 "
            "alone, keep attn_implementation as the technique sets it"
        )


class Int8Cache(Cache):
    """A transformers cache of `Int8Layer`s."""

    def __init__(self, layers: Sequence[Int8Layer]) -> None:
        super().__init__(layers=list(layers))

    def __iter__(self) -> NoReturn:
        raise TypeError("an int8 cache holds codes, not key and value tensors; see Int8Layer.dequantized")
