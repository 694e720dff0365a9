"""Rotary angles: rows of a table where positions are plain numbers, the model's rotary module where they are not."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

# Angles that depend on the length of the sequence cannot be tabulated.
CHANGING = ("dynamic", "longrope")
FIRST = 2048
LIMIT = 1 << 20  # positions; beyond, and below zero, angles are computed for the pass

# Addresses of cos and sin, elements between the rows of a batch, and what holds the memory.
Turned = tuple[int, int, int, Any]


class Table(NamedTuple):
    """cos and sin of positions 0, 1, …, both [positions, rope], and the frequencies that they were made with."""

    cos: Tensor
    sin: Tensor
    inverse: Tensor


class Angles:
    """cos and sin of a pass: memory, and the distance between the rows of a batch."""

    def __init__(self, decoder: Any, dtype: torch.dtype, rope: int) -> None:
        self._rotary = decoder.rotary_emb
        self._like = torch.empty(0, dtype=dtype)
        self._rope = rope
        self._fixed = not any(kind in self._rotary.rope_type for kind in CHANGING)
        self._size = dtype.itemsize * rope
        nothing = self._like.new_empty((0, rope))
        self._table = Table(nothing, nothing, self._rotary.inv_freq)

    def at(self, first: int, tokens: int) -> Turned:
        """Addresses of cos and sin of positions first .. first + tokens - 1, shared by all rows, and what holds them."""
        if not self._fixed or first < 0 or first + tokens > LIMIT:
            return self._computed(torch.arange(first, first + tokens)[None])
        table, offset = self._reach(first + tokens), first * self._size
        return table.cos.data_ptr() + offset, table.sin.data_ptr() + offset, 0, table

    def of(self, positions: Tensor) -> Turned:
        """The same for positions [rows, tokens], or [1 or 3, rows, tokens] of M-RoPE; rows is 1 or the batch."""
        if positions.dim() == 3:
            if any(not torch.equal(positions[0], each) for each in positions[1:]):
                return self._computed(positions)
            positions = positions[0]
        if positions.shape[1] == 1 and positions.shape[0] == 1:
            return self.at(int(positions), 1)
        if not self._fixed:
            return self._computed(positions)
        first, beyond = int(positions[0, 0]), int(positions.max()) + 1
        counted = torch.arange(first, first + positions.shape[1])
        if torch.equal(positions, counted.expand_as(positions)):
            return self.at(first, positions.shape[1])
        if int(positions.min()) < 0 or beyond > LIMIT:
            return self._computed(positions)
        table = self._reach(beyond)
        cos, sin = table.cos[positions], table.sin[positions]
        return cos.data_ptr(), sin.data_ptr(), _between(cos), (cos, sin)

    def _computed(self, positions: Tensor) -> Turned:
        cos, sin = (each.contiguous() for each in self._rotary(self._like, positions))
        return cos.data_ptr(), sin.data_ptr(), _between(cos), (cos, sin)

    def _reach(self, length: int) -> Table:
        """A table of positions below `length`, or more: it doubles, and follows a change of the frequencies."""
        table, inverse = self._table, self._rotary.inv_freq
        if length <= table.cos.shape[0] and inverse is table.inverse:
            return table
        rows = max(FIRST, 2 * table.cos.shape[0], length)
        with torch.inference_mode(False):  # a table made in inference mode could not be used outside of it
            both = self._rotary(self._like, torch.arange(rows)[None])
        cos, sin = (each.reshape(rows, -1).contiguous() for each in both)
        # In one go, and used from the local name: another thread may extend it meanwhile.
        table = self._table = Table(cos, sin, inverse)
        return table


def rotary_positions(positions: Tensor) -> Tensor:
    """The part of position_ids that turns: of Qwen3-VL's four rows the last three (text comes first)."""
    return positions[1:] if positions.dim() == 3 and positions.shape[0] == 4 else positions


def next_position(positions: Tensor | None, length: int) -> int | Tensor:
    """Where the next token of every row stands: a number if all stand there, else as `Angles.of` takes positions.

    Args:
        positions: position_ids whose last column is of the next token; None: it stands at `length`.
    """
    if positions is None:
        return length
    last = rotary_positions(positions)[..., -1:]
    first = int(last.reshape(-1)[0])
    return first if bool((last == first).all()) else last.clone()


def _between(angles: Tensor) -> int:
    """Elements between the rows of angles [rows, tokens, rope]; 0 when there is one row for all."""
    return angles.stride(0) if angles.shape[0] > 1 else 0
