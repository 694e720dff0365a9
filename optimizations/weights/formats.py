"""How a matrix is stored in fewer bits and multiplied from there: what the packed modules need of a format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch

Parts = Mapping[str, torch.Tensor]


class DoesNotFit(Exception):
    """A matrix whose values a format cannot hold; the message says why, in words."""


class WeightFormat(ABC):
    """Stores a matrix [rows, cols] as a few named tensors, its parts.

    `stacked` says that the rows are so many blocks of equal height which the format may pad each by itself
    (gate and up projections of one expert).
    """

    @abstractmethod
    def layout(
        self, rows: int, cols: int, stacked: int = 1
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name of each part -> shape and dtype."""

    @abstractmethod
    def encode(self, weight: torch.Tensor, out: Parts, stacked: int = 1) -> None:
        """Write the parts of `weight` [rows, cols] (bfloat16 or float32, contiguous) into `out`.

        Raises:
            DoesNotFit: not its size but its values are the reason.
        """

    def piece_rows(self, rows: int, cols: int) -> int | None:
        """Rows at whose multiples a matrix may be encoded piece by piece with `encode_piece`; None: only as a whole."""
        return None

    def encode_piece(self, weight: torch.Tensor, out: Parts, start: int, rows: int) -> None:
        """Write the part of `out` (of a matrix of `rows` rows, not stacked) that the rows from `start` on become.

        Raises:
            NotImplementedError: `piece_rows` is None.
        """
        raise NotImplementedError(f"{type(self).__name__} encodes a matrix as a whole")

    @abstractmethod
    def decode(
        self,
        parts: Parts,
        rows: int,
        cols: int,
        dtype: torch.dtype,
        stacked: int = 1,
        indices: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The matrix as `dtype` [rows, cols], or only the rows `indices` (int64 [n]) of it, [n, cols]."""

    @abstractmethod
    def linear(self, x: torch.Tensor, parts: Parts, rows: int, bias: torch.Tensor | None) -> torch.Tensor:
        """x [..., cols] times the transposed matrix, plus `bias` [rows]: [..., rows] in x's dtype."""

    @abstractmethod
    def experts(
        self,
        x: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
        gate_up: Parts,
        down: Parts,
        inner: int,
    ) -> torch.Tensor:
        """A mixture of experts: sum over k of weights[t, k] * down(silu(gate(x)) * up(x)) of expert index[t, k].

        Args:
            x: [tokens, hidden].
            index, weights: int64 and floating, both [tokens, k].
            gate_up, down: parts with a leading dimension of experts; gate_up of 2 * inner rows, stacked = 2.
            inner: width between the projections.

        Returns: [tokens, hidden] in x's dtype.
        """

    def unfit(self, rows: int, cols: int) -> str | None:
        """The reason why a matrix of this size cannot be stored, in words; None when it can."""
        return None


def allocate(
    fmt: WeightFormat, rows: int, cols: int, device: torch.device, stacked: int = 1, lead: Sequence[int] = ()
) -> dict[str, torch.Tensor]:
    """Uninitialized parts, with `lead` as extra first dimensions."""
    layout = fmt.layout(rows, cols, stacked)
    return {
        name: torch.empty((*lead, *shape), dtype=dtype, device=device)
        for name, (shape, dtype) in layout.items()
    }
