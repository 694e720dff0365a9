"""The native decoder's cache as transformers sees it: dense keys and values in memory that is allocated ahead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from optimizations.cache.growing_layer import ROOM, GrowingLayer, blocks
from optimizations.cache.int8_layer import Int8Cache, Int8Layer
from optimizations.decoder.plan import Plan
from optimizations.native.loader import native


class NativeLayer(GrowingLayer):
    """Keys [batch, heads, capacity, d] and values likewise of one layer; or latents and rotary keys.

    The native decoder reads and writes the memory itself. `update` does what transformers' own layers do, so that a
    pass which has to take transformers' path (attention maps, hidden states) goes on with the same cache.
    """

    keys: Any
    values: Any

    def __init__(self, room: int = ROOM) -> None:
        super().__init__()
        self.room = room  # tokens beyond the first ones that a new layer is made for

    @property
    def capacity(self) -> int:
        """Tokens there is room for."""
        return self.keys.shape[2] if self.is_initialized else 0

    @property
    def batch(self) -> int:
        """Rows, 0 before the first token."""
        return self.keys.shape[0] if self.is_initialized else 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Makes room for what comes and `room` tokens more; shapes [batch, heads, tokens, d]."""
        batch, heads, tokens, _ = key_states.shape
        self._allocate(batch, heads, tokens, (key_states.shape[3], value_states.shape[3]), key_states)

    def _allocate(self, batch: int, heads: int, tokens: int, widths: tuple[int, int], like: Tensor) -> None:
        self.dtype, self.device = like.dtype, like.device
        capacity = blocks(tokens + self.room)
        self.keys, self.values = (like.new_empty((batch, heads, capacity, width)) for width in widths)
        self.version += 1
        self.is_initialized = True

    def reserve(
        self, batch: int, heads: int, tokens: int, widths: tuple[int, int], dtype: torch.dtype
    ) -> None:
        """Room for `tokens` more; an empty layer gets `batch` rows of `heads` heads of these widths."""
        if not self.is_initialized:
            self._allocate(batch, heads, tokens, widths, torch.empty(0, dtype=dtype))
        elif self.length + tokens > self.capacity:
            self._move(self.batch, self.grown(self.length + tokens))

    def _move(self, batch: int, capacity: int, rows: Tensor | None = None) -> None:
        """New memory for `batch` rows and `capacity` tokens; row i was row rows[i], or i."""
        for name in ("keys", "values"):
            old = getattr(self, name)
            fresh = old.new_empty((batch, old.shape[1], capacity, old.shape[3]))
            filled = old[:, :, : self.length]
            fresh[:, :, : self.length] = filled if rows is None else filled[rows]
            setattr(self, name, fresh)
        self.version += 1

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends [batch, heads, tokens, d] each; returns all keys and values so far."""
        count = key_states.shape[2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        elif self.length + count > self.capacity or self.keys.is_inference():
            # Memory made in inference mode cannot be written outside of it, so it moves.
            self._move(self.batch, self.grown(self.length + count))
        start, self.length = self.length, self.length + count
        self.keys[:, :, start : self.length] = key_states
        self.values[:, :, start : self.length] = value_states
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def forget(self) -> None:
        self.keys = self.values = None

    def batch_select_indices(self, indices: Tensor) -> None:
        """Row i of the batch becomes row indices[i]; the batch may grow or shrink. A bool mask keeps what it marks."""
        if self.is_initialized:
            indices = indices.nonzero().reshape(-1) if indices.dtype == torch.bool else indices
            self._move(len(indices), self.capacity, indices)

    def offload(self) -> None:
        """Nothing to do: the memory is the host's."""

    prefetch = offload


class NativeCache(Cache):
    """A transformers cache of `NativeLayer`s; `room` as theirs."""

    layers: list[Any]

    def __init__(self, layers: int, room: int = ROOM) -> None:
        super().__init__(layers=[NativeLayer(room) for _ in range(layers)])


class Memory:
    """The addresses of a cache, read again only when its memory has moved."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._held: tuple[Any, int, Any] = (None, -1, None)  # cache, its version, description

    def of(self, cache: Any, batch: int, tokens: int) -> Any:
        """The native description of `cache` (NativeCache or Int8Cache) with room for `tokens` more.

        Raises:
            ValueError: the cache was made for another model, or holds another number of rows.
        """
        layers = cache.layers
        first = layers[0]
        if not first.is_initialized or first.length + tokens > first.capacity:
            _reserve(layers, batch, tokens, self._plan)
        version, held = sum(layer.version for layer in layers), self._held
        if cache is not held[0] or version != held[1]:
            # In one go, and read from the local name: another thread may run another cache meanwhile.
            held = self._held = (cache, version, _describe(layers, self._plan))
        if first.batch != batch:
            raise ValueError(f"the cache holds {first.batch} rows, the input has {batch}")
        return held[2]


def _reserve(layers: Sequence[Any], batch: int, tokens: int, plan: Plan) -> None:
    shape = plan.cache
    for layer in layers:
        layer.reserve(batch, shape.heads, tokens, (shape.first, shape.second), plan.dtype)


def _describe(layers: Sequence[Any], plan: Plan) -> Any:
    kinds: Any = native().decoder
    if len(layers) not in (1, plan.layers):
        raise ValueError(f"the cache has {len(layers)} layers, the model {plan.layers}")
    first = layers[0]
    describe = _int8_layer if isinstance(first, Int8Layer) else _dense_layer
    views = [kinds.LayerCache(*describe(layer, plan)) for layer in layers]
    return kinds.CacheMemory(isinstance(first, Int8Layer), first.batch, first.capacity, views)


def _dense_layer(layer: NativeLayer, plan: Plan) -> tuple[int, ...]:
    shape = plan.cache
    for tensor, width in ((layer.keys, shape.first), (layer.values, shape.second)):
        found = (tensor.shape[1], tensor.shape[3], tensor.dtype)
        if found != (shape.heads, width, plan.dtype) or not tensor.is_contiguous():
            raise ValueError(
                f"the cache holds {found[0]} heads of {found[1]} values in {found[2]}, "
                f"the model has {shape.heads} of {width} in {plan.dtype}"
            )
    return layer.keys.data_ptr(), 0, 0, layer.values.data_ptr(), 0, 0


def _int8_layer(layer: Int8Layer, plan: Plan) -> tuple[int, ...]:
    addresses: list[int] = []
    for store, width in zip(layer.stores, (plan.cache.first, plan.cache.second), strict=True):
        if (store.scales.shape[1], store.dim) != (plan.cache.heads, width):
            raise ValueError(
                f"the int8 cache holds {store.scales.shape[1]} heads of {store.dim} values, "
                f"the model has {plan.cache.heads} of {width}"
            )
        channel = 0 if store.channel is None else store.channel.data_ptr()
        addresses += (store.codes.data_ptr(), store.scales.data_ptr(), channel)
    return tuple(addresses)


def usable(cache: Any, plan: Plan) -> bool:
    """Whether the native decoder can read and write `cache`."""
    if not isinstance(cache, NativeCache | Int8Cache):
        return False
    return len(cache.layers) == plan.layers and cache.layers[0].length == cache.layers[-1].length
